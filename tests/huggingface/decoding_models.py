"""Policies of decoding, models, and what tests of `prepare` share."""

import torch

#: Architectures that every site of decoding knows; the first five with layers in one native call.
WHOLE = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma2"]
LINEAR = "qkv=int8, attention_out=int12, mlp_up=int8, mlp_down=int8"
GUARDED = (
    "scores=int8.center.hadamard+running:0.001, values=int8+topz:0.003, qkv=int12, attention_out=int12, "
    "mlp_up=int12+output:0.0001, mlp_down=int8+output:0.0003, lm_head=int8+running:0.00001"
)
#: Everything but the linear layers in full precision, so that two ways of computing differ by little.
STEADY = (
    "scores=int8.center.hadamard+all, values=int8+all, qkv=int12, attention_out=int12, mlp_up=int8+all, "
    "mlp_down=int8+all"
)


def decoded(model, tokens, cache, prompt=9, mask=None):
    """Logits float32 (batch, steps, vocabulary) of what follows a prompt, token by token."""
    masks = torch.ones_like(tokens) if mask is None else mask
    model(tokens[:, :prompt], attention_mask=masks[:, :prompt], past_key_values=cache)
    steps = [
        model(tokens[:, t : t + 1], attention_mask=masks[:, : t + 1], past_key_values=cache).logits
        for t in range(prompt, tokens.shape[1])
    ]
    return torch.cat(steps, dim=1)


def generated(model, tokens, count=12):
    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False
    )


def left_padding(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :4] = 0
    return mask


def is_untouched(model, implementation="eager"):
    assert not any("forward" in vars(module) for module in model.modules())
    assert "_prepare_cache_for_generation" not in vars(model)
    assert model.config._attn_implementation == implementation
    return True
