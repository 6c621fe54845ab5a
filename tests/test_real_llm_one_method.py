"""On a real language model, too, a policy is simulated as it is decoded."""

import copy

import pytest
import torch
from transformers import DynamicCache

import torchlamp
from torchlamp.bench.off_grid import off_grid
from torchlamp.data.text import cut_windows, default_text
from torchlamp.evaluation.metrics import Comparer
from torchlamp.huggingface.prepare import prepare

pytestmark = pytest.mark.llm
POLICY = (
    "scores=int8.center.hadamard+running:0.001, values=int8+topz:0.003, qkv=int12, attention_out=int12, "
    "mlp_up=int8+output:0.001, mlp_down=int8+output:0.0006, lm_head=int8+running:1e-05"
)
PROMPT = 120


#: Tokens of the steps after the prompt.
STEPS = (1, 1, 4, 2)


@torch.no_grad()
def test_prompt_and_steps_of_smollm2_are_simulated_as_they_are_decoded():
    model, tokenizer = torchlamp.load("smollm2-135m")
    model.set_attn_implementation("sdpa")
    tokens = cut_windows(tokenizer, [default_text()], 1, PROMPT + sum(STEPS))

    def prompt(cache):
        return model(tokens[:, :PROMPT], past_key_values=cache).logits.double()

    def steps(cache):
        ends = [PROMPT + sum(STEPS[: i + 1]) for i in range(len(STEPS))]
        parts = [
            model(tokens[:, end - n : end], past_key_values=cache).logits
            for n, end in zip(STEPS, ends, strict=True)
        ]
        return torch.cat(parts, dim=1).double()

    full, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    exact = [prompt(full), steps(full)]
    with prepare(model, POLICY, full="float32") as prepared:
        cache = prepared.cache()
        decoded, real = [prompt(cache)], [copy.deepcopy(prepared.statistics)]
        prepared.statistics.reset()
        decoded.append(steps(cache))
        real.append(prepared.statistics)
    # The attention of a prompt is in float32.
    with torchlamp.lookahead(model, torchlamp.Policy.parse(POLICY).without("scores", "values")) as first:
        same = [prompt(plain)]
    with torchlamp.lookahead(model, POLICY) as then:
        same.append(steps(plain))
    for got, want, reference in zip(decoded, same, exact, strict=True):
        # What either leaves of float32 is many times what lies between them.
        assert (got - want).norm() < 0.03 * (got - reference).norm()
    for one, other in zip(real, (first, then), strict=True):
        for site, selected in one.selected_by_site.items():
            assert other.eligible_by_site[site] == one.eligible_by_site[site]
            assert abs(other.selected_by_site[site] - selected) <= 2 + 0.005 * selected


@torch.no_grad()
def test_the_default_policy_keeps_a_whole_prompt():
    model, tokenizer = torchlamp.load("smollm2-135m")
    off_grid(model)
    tokens = cut_windows(tokenizer, [default_text()], 1, 257)[0]
    comparer = Comparer()
    reference = comparer.reference(model(tokens[None, :-1]).logits[0], tokens[1:])
    with prepare(model) as prepared:
        logits = model(tokens[None, :-1], past_key_values=prepared.cache()).logits[0]
    kl = comparer.compare(reference, logits).kl
    assert 0 < float(kl.mean()) < 1e-4
