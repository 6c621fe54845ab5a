"""An evaluation says when the low pass of its policy isn't to be trusted."""

import logging

import pytest
import torch
import transformers

import torchlamp


def model(bias: float) -> transformers.PreTrainedModel:
    """A Qwen 2 with key biases of that size."""
    torch.manual_seed(5)
    config = transformers.Qwen2Config(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
    )
    made = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.k_proj.bias.normal_().mul_(bias)
            layer.self_attn.q_proj.bias.normal_().mul_(bias / 4)
    return made


@pytest.mark.parametrize(("policy", "said"), [("ps3+strict:0.1", True), ("ps12+strict:0.1", False)])
def test_large_key_biases(policy, said, caplog):
    windows = torch.randint(2, 61, (2, 64), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        torchlamp.evaluate(model(25.0), windows, policy, baselines=False)
    lines = [r.getMessage() for r in caplog.records if "trusted" in r.getMessage()]
    assert len(lines) == said
    assert all(line.startswith(f"policy {policy}: the low pass of the scores") for line in lines)
    with torch.no_grad(), torchlamp.lookahead(made := model(25.0), policy) as statistics:
        made(windows)
    assert (statistics.doubt > 0.15) == said
    assert len(statistics.doubt_by_layer) == 2
