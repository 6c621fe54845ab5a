"""The simulation of a policy and the kernels that run it agree: logits of a step, and what is read in full.

A prompt runs in float32 with a cache for each; then come steps of one token, of the prepared model with its look-ahead
cache and of the model under `lookahead` with transformers' own.
"""

import os
from contextlib import contextmanager

import pytest
import torch
from decoding_models import left_padding
from transformers import DynamicCache

import torchlamp
from torchlamp.huggingface.prepare import prepare
from torchlamp.kernels import native

pytestmark = pytest.mark.usefixtures("no_grad")
MODELS = ["llama", "qwen2", "gemma3"]
PROMPT, LENGTH = 6, 14
#: One site after the other; where one kernel runs two, the other is read in full.
ALONE = {
    "scores": "scores=int8.center.hadamard+{running}, values=int8+all",
    "plain scores": "scores=int4+{running}, values=int8+all",
    "values": "scores=int8+all, values=int8+{topz}",
    "qkv": "qkv=int12",
    "attention_out": "attention_out=int8",
    "mlp_up": "mlp_up=int8+{output}, mlp_down=int12+all",
    "mlp_down": "mlp_up=int12+all, mlp_down=int8+{output}",
    "lm_head": "lm_head=int8+{head}",
    "all sites": (
        "scores=int8.center.hadamard+{running}, values=int8+{topz}, qkv=int12, attention_out=int12, "
        "mlp_up=int8+{output}, mlp_down=int8+{output}, lm_head=int8+{head}"
    ),
}
RULES = {
    "none": {"running": "none", "topz": "none", "output": "none", "head": "none"},
    "threshold": {
        "running": "running:0.001",
        "topz": "topz:0.1",
        "output": "output:0.0005",
        "head": "running:0.0001",
    },
    "all": {"running": "all", "topz": "all", "output": "all", "head": "all"},
}

_NATIVE = pytest.mark.skipif(not native.available(), reason="no native kernels here")
IMPLEMENTATIONS = ["torch", pytest.param("", id="native", marks=_NATIVE)]


@contextmanager
def kernels(name):
    before = os.environ.get("TORCHLAMP_KERNELS")
    os.environ["TORCHLAMP_KERNELS"] = name
    try:
        yield
    finally:
        del os.environ["TORCHLAMP_KERNELS"]
        if before is not None:
            os.environ["TORCHLAMP_KERNELS"] = before


def steps(model, tokens, mask, cache, prompt=PROMPT):
    return torch.cat(
        [
            model(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
            for t in range(prompt, tokens.shape[1])
        ],
        dim=1,
    )


def both(model, tokens, mask, policy, full="float32", prompt=PROMPT):
    """Logits (batch, steps, vocabulary) of a prepared model, and of the simulation, and both statistics."""
    plain = DynamicCache(config=model.config)
    start = {"attention_mask": mask[:, :prompt]}
    with prepare(model, policy, full=full) as prepared:
        cache = prepared.cache() if "scores" in prepared.policy.sites else DynamicCache(config=model.config)
        model(tokens[:, :prompt], past_key_values=cache, **start)
        prepared.statistics.reset()  # the head of the prompt's last token, if it ran
        got = steps(model, tokens, mask, cache, prompt)
        real = prepared.statistics
    # What padding sees of nothing depends on the attention; a mean of keys sees it.
    model.set_attn_implementation("sdpa")
    model(tokens[:, :prompt], past_key_values=plain, **start)
    with torchlamp.lookahead(model, policy) as simulated:
        want = steps(model, tokens, mask, plain, prompt)
    return got, want, real, simulated


def agree(real, simulated, slack=0):
    """Whether both read as much in full at every site that a rule works at."""
    mine, theirs = simulated.selected_by_site, real.selected_by_site
    sites = [site for site in theirs if site not in ("qkv", "attention_out")]
    assert all(simulated.eligible_by_site[site] == real.eligible_by_site[site] for site in sites)
    return all(abs(mine[site] - theirs[site]) <= slack for site in sites)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("site", ALONE)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_simulated_as_it_is_decoded(build, tokens, name, site, rules, implementation):
    model, x, mask = build(name), tokens(3, LENGTH), left_padding(3, LENGTH)
    with kernels(implementation):
        got, want, real, simulated = both(model, x, mask, ALONE[site].format(**RULES[rules]))
    print('REL', name, site, rules, implementation, float((got-want).norm()/want.norm()), [float(((got-want)[i].norm()/want.norm())) for i in range(3)], real.selected_by_site, simulated.selected_by_site)
    assert (got - want).norm() < 2e-5 * want.norm()
    assert agree(real, simulated)
