"""The sizes that results hold, for the configs of several architectures."""

from types import SimpleNamespace

import pytest
from transformers import Gemma3Config, Gemma3TextConfig, GPT2Config, LlamaConfig

from torchlamp.evaluation.sizes import model_sizes


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (LlamaConfig(hidden_size=96, num_attention_heads=6, intermediate_size=200), (16, 96, 96, 200)),
        (LlamaConfig(hidden_size=96, num_attention_heads=6, head_dim=32), (32, 192, 96, 11008)),
        (Gemma3TextConfig(hidden_size=640, head_dim=256, intermediate_size=2048), (256, 2048, 640, 2048)),
        (Gemma3Config(text_config={"hidden_size": 640, "head_dim": 64}), (64, 512, 640, 9216)),
        (GPT2Config(n_embd=48, n_head=3), (16, 48, 48, 192)),
        (GPT2Config(n_embd=48, n_head=3, n_inner=50), (16, 48, 48, 50)),
    ],
)
def test_sizes_of_a_config(config, sizes):
    found = model_sizes(SimpleNamespace(config=config))
    assert found == dict(zip(("head", "attention", "hidden", "mlp"), sizes, strict=True))


def test_what_a_config_does_not_say_is_left_out():
    config = SimpleNamespace(hidden_size=10)
    config.get_text_config = lambda: config
    assert model_sizes(SimpleNamespace(config=config)) == {"hidden": 10}
