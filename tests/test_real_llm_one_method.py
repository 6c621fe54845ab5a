"""On a real language model, too, a policy is simulated as it is decoded."""

import pytest
import torch
from transformers import DynamicCache

import torchlamp
from torchlamp.data.text import cut_windows, default_text
from torchlamp.huggingface.prepare import prepare

pytestmark = pytest.mark.llm
POLICY = (
    "scores=int8.center.hadamard+running:0.001, values=int8+topz:0.003, qkv=int12, attention_out=int12, "
    "mlp_up=int8+output:0.001, mlp_down=int8+output:0.0006, lm_head=int8+running:1e-05"
)
PROMPT = 120


@torch.no_grad()
def test_a_step_of_smollm2_is_simulated_as_it_is_decoded():
    model, tokenizer = torchlamp.load("smollm2-135m")
    model.set_attn_implementation("sdpa")
    tokens = cut_windows(tokenizer, [default_text()], 1, PROMPT + 8)

    def steps(cache):
        logits = [
            model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, PROMPT + 8)
        ]
        return torch.cat(logits, dim=1).double()

    full, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for cache in (full, plain):
        model(tokens[:, :PROMPT], past_key_values=cache)
    exact = steps(full)
    with prepare(model, POLICY, full="float32") as prepared:
        cache = prepared.cache()
        model(tokens[:, :PROMPT], past_key_values=cache)
        prepared.statistics.reset()
        decoded = steps(cache)
        real = prepared.statistics
    with torchlamp.lookahead(model, POLICY) as simulated:
        same = steps(plain)
    # What either leaves of float32 is many times what lies between them.
    assert (decoded - same).norm() < 0.03 * (decoded - exact).norm()
    for site, selected in real.selected_by_site.items():
        assert simulated.eligible_by_site[site] == real.eligible_by_site[site]
        assert abs(simulated.selected_by_site[site] - selected) <= 2 + 0.005 * selected
