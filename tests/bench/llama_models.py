"""Small random models of the types that go to llama.cpp, and how far logits are apart."""

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 320


def llama(**other: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        **other,
    )
    return _lively(LlamaForCausalLM, config)


def qwen(**other: Any) -> Any:
    """With biases of queries, keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        **other,
    )
    return _lively(Qwen2ForCausalLM, config)


def gemma(layers: int = 7, **other: Any) -> Any:
    """Of seven layers, the sixth sees all; the window is 64 tokens."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    ropes = {"full_attention": 5000.0, "sliding_attention": 10000.0}
    settings = {
        "query_pre_attn_scalar": 32,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": t} for name, t in ropes.items()},
        **other,
    }
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=64,
        max_position_embeddings=1024,
        initializer_range=0.3,
        **settings,
    )
    return _lively(Gemma3ForCausalLM, config)


def _lively(cls: Any, config: Any) -> Any:
    """In eval mode, with norms and biases that do something."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids[None]).logits[0]
    return found


def kl(reference: Any, tested: Any) -> float:
    """Mean KL in nats of logits (length, vocabulary)."""
    true, other = (torch.as_tensor(x).double().log_softmax(-1) for x in (reference, tested))
    return float((true.exp() * (true - other)).sum(-1).mean())
