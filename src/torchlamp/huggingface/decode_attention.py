"""The attention "lamp-decode": look-ahead over a `LookaheadCache` for single tokens, float32 for all else."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from torchlamp.huggingface.lookahead_cache import NAME

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
    """Attention as transformers calls it; see `LookaheadCache` for what single tokens read.

    Queries are float32 (batch, heads, queries, size), keys and values (batch, key heads, keys, size) come from the
    cache's `update`, the mask is bool (batch, 1, queries, keys) or None. Returns float32 (batch, queries, heads, size).

    Raises
    ------
    ValueError
        Keywords that change the mathematics and aren't handled, or dropout.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{NAME}: {type(module).__name__} passes {name}, which isn't handled; use another attention"
            )
    if dropout:
        raise ValueError(f"{NAME}: dropout={dropout} is for training; call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = getattr(key, "lookahead", None)
    if found is None:
        if softcap is None and s_aux is None:
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs
            )
            return output, None
        return _eager(module, query, key, value, attention_mask, scale, softcap, s_aux), None
    layer, first = found
    mask = None if attention_mask is None else attention_mask[:, 0]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask >= 0
    attended = layer.store.attend(
        query,
        scaling=scale,
        scores_threshold=layer.scores.threshold,
        values_threshold=layer.values_settings.threshold,
        mask=mask,
        first=first,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.detach().float().contiguous(),
    )
    if layer.statistics is not None:
        layer.statistics.record("scores", layer.number, attended.recomputed, attended.eligible)
        layer.statistics.record("values", layer.number, attended.full_values, attended.eligible_values)
    return attended.output, None


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
        scores = scores.masked_fill(
            ~mask if mask.dtype == torch.bool else mask < 0, torch.finfo(scores.dtype).min
        )
    if sinks is not None:
        extra = sinks.view(1, -1, 1, 1).expand(batch, -1, queries, 1).to(scores.dtype)
        scores = torch.cat([scores, extra], -1)
    z = scores.softmax(-1)[..., : key.shape[2]]
    return (z @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous()


# It counts, and calls kernels that a compiler can't see into (transformers compiles static-cache decoding).
AttentionInterface.register(NAME, torch.compiler.disable(decode_attention))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, sdpa_mask)
