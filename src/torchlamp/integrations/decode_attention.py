"""The attention function that transformers calls under the name "lamp-decode".

Keys that a `LookaheadCache` hands out carry their store, and a few queries attend to it in one native call. Everything
else, a prefill above all, runs in float32 through transformers' `sdpa` function, or through torchlamp's own where that
one can't: with a softcap or sinks. Importing this module registers the name, with the boolean masks of `sdpa`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from torchlamp.compositions.attention import attention
from torchlamp.compositions.policy import SitePolicy
from torchlamp.compositions.visibility import visibility
from torchlamp.integrations.forward_only import forward_only
from torchlamp.integrations.lamp_attention import HARMLESS

#: Name of the attention implementation, as in `model.set_attn_implementation("lamp-decode")`.
NAME = "lamp-decode"
#: Queries of a call beyond which full precision is as fast.
FEW = 8

_FLOAT32 = SitePolicy.parse("fp32+none")
_KNOWN = HARMLESS | {"softcap", "s_aux", "is_causal"}


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, over a store where the keys have one.

    Parameters
    ----------
    module : nn.Module
        The attention module.
    query, key, value : Tensor
        (batch, heads, queries, size), (batch, key heads, keys, size) and (batch, key heads, keys, value size).
    attention_mask : Tensor or None
        bool or additive float, (batch or 1, heads or 1, queries, keys). None: one query sees every key, and of several
        the last does, the one before it all but the last, and so on.
    scaling : float or None
        Factor of the scores; None: 1 / sqrt(size).
    dropout : float
        Must be 0.
    **kwargs
        `softcap`, `s_aux` and `is_causal` are used; arguments known to change nothing are ignored.

    Returns
    -------
    Tensor, None
        (batch, queries, heads, value size) in the dtype of the query.

    Raises
    ------
    ValueError
        Dropout, attention weights asked for, or an argument that changes the result and isn't supported.
    """
    if dropout or kwargs.get("output_attentions") or not _KNOWN.issuperset(kwargs):
        _check(module, dropout, kwargs)
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    view = getattr(key, "lookahead", None)
    if view is None:
        return _in_full(module, query, key, value, attention_mask, factor, kwargs)
    queries = query.shape[2]
    mask, served = _boolean(attention_mask, query, view.last - view.first)
    if queries > FEW or not served:
        keys, values = (x.to(query.dtype) for x in view.full())
        return _in_full(module, query, keys, values, attention_mask, factor, kwargs)
    causal = queries > 1 and mask is None and kwargs.get("is_causal") is not False
    causal = causal and getattr(module, "is_causal", True)
    layer, dtype = view.layer, query.dtype
    sinks = kwargs.get("s_aux")
    attended = layer.store.attend(
        query if dtype == torch.float32 else query.float(),
        thresholds=layer.thresholds,
        scaling=factor,
        first=view.first,
        last=view.last,
        mask=mask,
        causal=causal,
        sinks=sinks if sinks is None else sinks.float(),
        softcap=kwargs.get("softcap") or 0.0,
    )
    layer.counts.add(attended.totals)
    output = attended.output if dtype == torch.float32 else attended.output.to(dtype)
    return forward_only(output, query), None


def _in_full(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention in full precision."""
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and causal and 1 < queries < keys:  # `sdpa` would count from the first key
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        attention_mask = attention_mask[None, None]
    if not softcap and sinks is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=causal
        )
        return output, None
    shape = (query.shape[0], query.shape[1], queries, keys)
    seen = visibility(attention_mask, shape=shape, causal=causal)
    with torch.no_grad():
        result = attention(
            query.float(),
            key.float(),
            value.float(),
            accumulator=_FLOAT32.accumulate,
            rule=_FLOAT32.rule,
            scaling=scaling,
            mask=seen.mask,
            causal=seen.causal,
            bias=seen.bias,
            softcap=softcap or None,
            sinks=None if sinks is None else sinks.float(),
        )
    return forward_only(result.output.to(query.dtype), query, key, value), None


def _boolean(mask: Tensor | None, query: Tensor, keys: int) -> tuple[Tensor | None, bool]:
    """A mask as bool (batch, queries, keys), and whether it has that form."""
    if mask is None:
        return None, True
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != keys or mask.dtype != torch.bool:
        return None, False
    return mask[:, 0].expand(query.shape[0], query.shape[2], keys), True


def _check(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout:
        raise ValueError(f"{name} asks for attention dropout {dropout}: call model.eval() first")
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: the attention 'lamp-decode' doesn't return weights; "
            "use attn_implementation='eager' to get them"
        )
    unknown = sorted(key for key, value in kwargs.items() if value is not None and key not in _KNOWN)
    if unknown:
        raise ValueError(
            f"{name} passes {', '.join(map(repr, unknown))} to its attention, which {NAME!r} doesn't support: "
            "it may change the result"
        )


# It calls kernels that a compiler can't see into.
AttentionInterface.register(NAME, torch.compiler.disable(decode_attention))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, sdpa_mask)
