"""The attention "lamp-decode": look-ahead over a `LookaheadCache` for steps of a few tokens, float32 for prompts."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from torchlamp.huggingface.lookahead_cache import NAME, LookaheadLayer, read_layer
from torchlamp.huggingface.masks import seen_keys, sees

__all__ = ["NAME", "decode_attention"]
#: Keywords that change the mathematics in ways that aren't handled.
_REFUSED = ("position_bias", "cache")


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; see `LookaheadCache` for what the tokens of a step read.

    Queries are float32 (batch, heads, queries, size), keys and values (batch, key heads, keys, size) come from the
    cache's `update`. The mask, (batch, 1 or heads, queries, keys), is bool, added to the scores, or None. Steps whose
    mask is more than a choice of keys (`seen_keys`) read keys and values in full. Returns float32 (batch,
    queries, heads, size).

    Raises
    ------
    ValueError
        Keywords that change the mathematics and aren't handled, attention weights that are wanted, or dropout.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{NAME}: {type(module).__name__} passes {name}, which isn't handled; use another attention"
            )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"output_attentions=True: the attention {NAME!r} doesn't return its weights; undo the preparation and use "
            "attn_implementation='eager' to get them"
        )
    if dropout:
        raise ValueError(f"{NAME}: dropout={dropout} is for training; call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, queries = read_layer(), query.shape[2]
    if layer is not None and not layer.is_step(queries, layer.store.length - queries):
        layer = None
    seen = None if attention_mask is None else seen_keys(attention_mask)
    both_ways = attention_mask is None and queries > 1 and not getattr(module, "is_causal", True)
    if layer is None or both_ways or (attention_mask is not None and seen is None):
        if attention_mask is not None and (seen is None or attention_mask.dtype != torch.bool):
            attention_mask = _as_biases(attention_mask, query.dtype)
        if layer is not None:
            key, value = key.float(), value.float()
            _count_all(layer, query, key, attention_mask)
        if softcap is None and s_aux is None:
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs
            )
            return output, None
        return _eager(module, query, key, value, attention_mask, scale, softcap, s_aux), None
    attended = layer.store.attend(
        query,
        scaling=scale,
        scores_threshold=layer.scores.threshold,
        values_threshold=layer.values_settings.threshold,
        mask=seen,
        first=layer.first(queries),
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.detach().float().contiguous(),
    )
    if layer.statistics is not None:
        layer.statistics.record("scores", layer.number, attended.recomputed, attended.eligible)
        layer.statistics.record("values", layer.number, attended.full_values, attended.eligible_values)
    return attended.output, None


def _as_biases(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that a mask adds to scores of a dtype; hidden keys get its lowest, as in eager attention."""
    lowest = torch.finfo(dtype).min
    if mask.dtype != torch.bool:
        return mask.to(dtype).clamp(min=lowest)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)


def _count_all(layer: LookaheadLayer, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Count every key that the queries see, and its value, as read in full precision."""
    if layer.statistics is None or mask is None:
        return
    batch, heads, queries, _ = query.shape
    seen = sees(mask).expand(batch, heads, queries, -1)
    scores = int(seen.sum())
    values = int(seen.reshape(batch, key.shape[1], -1, *seen.shape[2:]).any(2).sum())
    layer.statistics.record("scores", layer.number, scores, scores)
    layer.statistics.record("values", layer.number, values, values)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Full-precision attention with a softcap or sinks, which torch's own doesn't know."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and queries > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if boolean else scores + mask
    if sinks is not None:
        extra = sinks.view(1, -1, 1, 1).expand(batch, -1, queries, 1).to(scores.dtype)
        scores = torch.cat([scores, extra], -1)
    z = scores.softmax(-1)[..., : key.shape[2]]
    return (z @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous()


# It counts, and calls kernels that a compiler can't see into (transformers compiles static-cache decoding).
AttentionInterface.register(NAME, torch.compiler.disable(decode_attention))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, sdpa_mask)
