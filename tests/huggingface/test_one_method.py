"""The simulation of a policy and the kernels that run it agree: logits of prompts and steps, and what is read in full.

A prompt runs with a cache for each, all its sites but the attention's under the policy; then come steps of one token or
of some, of the prepared model with its look-ahead cache and of the model under `lookahead` with transformers' own.
"""

import copy
import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
from decoding_models import left_padding
from transformers import DynamicCache

import torchlamp
from torchlamp.huggingface.prepare import prepare
from torchlamp.kernels import native
from torchlamp.policy.policy import Policy
from torchlamp.simulation.statistics import Statistics

pytestmark = pytest.mark.usefixtures("no_grad")
MODELS = ["llama", "qwen2", "gemma3"]
#: No longer than what the sliding window leaves in transformers' cache: the mean of the keys is over these.
PROMPT, LENGTH = 5, 14
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


def steps(model, tokens, mask, cache, prompt=PROMPT, size=1):
    return torch.cat(
        [
            model(tokens[:, t : t + size], attention_mask=mask[:, : t + size], past_key_values=cache).logits
            for t in range(prompt, tokens.shape[1], size)
        ],
        dim=1,
    )


def both(model, tokens, mask, policy, full="float32", prompt=PROMPT, size=1):
    """Of a prepared model and of the simulation: logits (batch, tokens, vocabulary), statistics of prompt and steps."""
    # What padding sees of nothing depends on the attention; a mean of keys sees it.
    model.set_attn_implementation("sdpa")
    plain = DynamicCache(config=model.config)
    start = {"attention_mask": mask[:, :prompt]}
    with prepare(model, policy, full=full) as prepared:
        cache = prepared.cache() if "scores" in prepared.policy.sites else DynamicCache(config=model.config)
        got = [model(tokens[:, :prompt], past_key_values=cache, **start).logits]
        real = [copy.deepcopy(prepared.statistics)]
        prepared.statistics.reset()
        got.append(steps(model, tokens, mask, cache, prompt, size))
        real.append(prepared.statistics)
    parsed = Policy.parse(policy)
    linear = {name: site for name, site in parsed.sites.items() if name not in ("scores", "values")}
    with torchlamp.lookahead(model, Policy(sites=linear)) if linear else nullcontext(Statistics()) as first:
        want = [model(tokens[:, :prompt], past_key_values=plain, **start).logits]
    with torchlamp.lookahead(model, policy) as simulated:
        want.append(steps(model, tokens, mask, plain, prompt, size))
    return torch.cat(got, 1), torch.cat(want, 1), real, [first, simulated]


def agree(real, simulated, slack=0):
    """Whether both read as much in full at every site that a rule works at, in prompt and steps."""
    return all(_agree(*pair, slack) for pair in zip(real, simulated, strict=True))


def _agree(real, simulated, slack):
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
    # Native kernels sum low-bit values with weights of 16 bits.
    sixteen = implementation == "" and "values" in real[1].selected_by_site and (rules != "all")
    assert (got - want).norm() < (1e-3 if sixteen else 5e-5) * want.norm()
    assert agree(real, simulated, slack=2 if sixteen else 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("site", ["scores", "plain scores", "values", "all sites"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_some_tokens_is_simulated_as_it_is_decoded(build, tokens, name, site, size, implementation):
    model, x, mask = build(name), tokens(3, LENGTH), left_padding(3, LENGTH)
    with kernels(implementation):
        policy = ALONE[site].format(**RULES["threshold"])
        got, want, real, simulated = both(model, x, mask, policy, size=size)
    sixteen = implementation == "" and "values" in policy
    assert (got - want).norm() < (1e-3 if sixteen else 5e-5) * want.norm()
    assert agree(real, simulated, slack=2 if sixteen else 0)
    assert real[1].selected > 0


@pytest.mark.parametrize("name", MODELS)
def test_copies_in_float16_differ_by_their_rounding(build, tokens, name):
    model, x, mask = build(name), tokens(3, LENGTH), left_padding(3, LENGTH)
    got, want, _, _ = both(model, x, mask, ALONE["all sites"].format(**RULES["all"]), full="float16")
    assert 1e-5 * want.norm() < (got - want).norm() < 2e-3 * want.norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_window_is_its_steps(build, tokens, name):
    """Without centred keys, whose mean is that of the prompt, a forward pass over a window is all steps at once."""
    model, x = build(name), tokens(2, LENGTH)
    policy = ALONE["all sites"].format(**RULES["threshold"]).replace(".center", "")
    cache = DynamicCache(config=model.config)
    with torchlamp.lookahead(model, policy) as whole:
        want = model(x).logits
    with torchlamp.lookahead(model, policy) as single:
        got = steps(model, x, torch.ones_like(x), cache, prompt=0)
    assert (got - want).norm() < 5e-5 * want.norm()
    assert single.eligible_by_site == whole.eligible_by_site
    for site, selected in single.selected_by_site.items():
        assert abs(selected - whole.selected_by_site[site]) <= 2
        assert selected > 0 or site in ("qkv", "attention_out")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt_oss"])
def test_reading_everything_in_full_changes_nothing(build, tokens, name):
    model, x, mask = build(name), tokens(3, LENGTH), left_padding(3, LENGTH)
    want = model(x, attention_mask=mask).logits[:, 4:]
    linear = "" if name == "gpt_oss" else ", mlp_up=mxfp4+all, mlp_down=int4+all"
    policy = f"scores=int4.center.hadamard+all, values=mxfp6+all, qkv=nvfp4+all, attention_out=int8/row+all{linear}"
    with torchlamp.lookahead(model, policy + ", lm_head=e4m3fn/row+all"):
        got = model(x, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operand", ["int4", "int8/row", "mxfp8", "mxfp4", "nvfp4", "e4m3fn/row"])
@pytest.mark.parametrize("behind", ["", "@fp32", "@ps10"])
def test_every_operand_runs_and_look_ahead_helps(build, tokens, operand, behind):
    model, x = build("llama"), tokens(2, LENGTH)
    want = model(x).logits
    sites = (
        "values",
        "qkv",
        "attention_out",
        "mlp_up",
        "mlp_down",
        "lm_head",
        *([] if behind else ["scores"]),
    )
    errors = {}
    for rule in ("none", "running:0.002"):
        own = {
            site: "topz:0.2" if site == "values" and not behind and rule != "none" else rule for site in sites
        }
        policy = ", ".join(f"{site}={operand}{behind}+{own[site]}" for site in sites)
        with torchlamp.lookahead(model, policy) as statistics:
            errors[rule] = float((model(x).logits - want).norm())
        rates = [statistics.selected_by_site[s] / statistics.eligible_by_site[s] for s in sites]
        # A stored head always reads what could be the largest logit in full.
        assert (sum(rates) > 0) == (rule != "none" or not behind)
        assert sum(rates) < len(rates)
    assert 0 < errors["running:0.002"] < errors["none"]


def test_samples_and_threads_do_not_matter(build, tokens):
    model, x = build("llama"), tokens(3, LENGTH)
    policy = ALONE["all sites"].format(**RULES["threshold"])
    with torchlamp.lookahead(model, policy):
        together = model(x).logits
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1]).logits[0], together[i], rtol=1e-5, atol=1e-5)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        torch.testing.assert_close(model(x).logits, together, rtol=1e-6, atol=1e-6)
        torch.set_num_threads(before)


def test_a_deep_copy_of_a_model_has_copies_of_its_own(build, tokens):
    model, x = build("llama"), tokens(1, LENGTH)
    with torchlamp.lookahead(model, "mlp_up=int8+output:0.001, mlp_down=int4, lm_head=int4"):
        want = model(x).logits
        other = copy.deepcopy(model)
        other.model.layers[0].mlp.down_proj.weight.zero_()
        assert torch.equal(model(x).logits, want)
        assert not torch.allclose(other(x).logits, want, atol=1e-3)


def test_evaluate_measures_a_decoding_policy_over_whole_windows(build, tokens):
    model, x = build("llama"), tokens(3, LENGTH)
    policy = ALONE["all sites"].format(**RULES["threshold"])
    result = torchlamp.evaluate(model, x, policy)
    bare = torchlamp.evaluate(model, x, str(torchlamp.Policy.parse(policy).unguarded()))
    assert 0 < result.kl_mean < bare.kl_mean
    assert 0 < result.recompute_rate < 1
    assert result.policy == str(torchlamp.Policy.parse(policy))
