"""Attention under a threshold rule in one native call.

The native kernel does for the threshold rules what the torch loop of `torchlamp.simulation.attention_tiles` does for
every rule; that loop is its reference. On the CPU both agree bit for bit: where the kernel would serve, the loop takes
its exponential, order of sums and order of values (`reference_softmax`). Only the weights `relaxed` and those that look
to the residual stream are formed by torch's own functions there: an entry whose weight lies within an ulp of the
threshold may be decided otherwise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchlamp.kernels.constants import BLOCK_KEYS, RULE_WEIGHTS
from torchlamp.kernels.dispatch import as_native, gpu_for, native_for
from torchlamp.kernels.specification import Accumulation, accumulation_numbers


class BridgeNorms(NamedTuple):
    """What a bridge estimates errors from: b = error_scale sqrt(score_part y^2 + norm_part |q|^2 |k|^2).

    Attributes
    ----------
    query_squares, key_squares : Tensor
        float32 (B, H, Lq) and (B, Hkv, Lk): |q|^2 and |k|^2.
    score_part, norm_part : float
        The factors.
    """

    query_squares: Tensor
    key_squares: Tensor
    score_part: float
    norm_part: float


class ResidualPath(NamedTuple):
    """What lies between the heads and the residual stream, for the weights that look that far.

    Attributes
    ----------
    factor : Tensor
        float32 (H, Dv, Dv): L_h, the length of a change x of a head's output in the stream being |L_h^T x|.
    mapped, squares : Tensor
        float32 (B, H, Lk, Dv) and (B, H, Lk): L_h^T v_j and its squared norm.
    scale : Tensor
        float32 (B, Lq), > 0: what changes are relative to.
    """

    factor: Tensor
    mapped: Tensor
    squares: Tensor
    scale: Tensor


def serves(
    accumulation: Accumulation, weight: str, mask: Tensor | None, causal: bool, sinks: Tensor | None
) -> bool:
    """Whether the native kernel knows such a call of `fused_attention`, whether or not it is here."""
    grouped = accumulation.fuse is not None and accumulation.fuse.group > 1
    return (
        (mask is None or (mask.shape[1] == 1 and not causal))
        and not (weight == "relaxed" and sinks is not None)
        and not grouped
    )


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    accumulation: Accumulation,
    *,
    weight: str,
    threshold: float,
    by_length: bool,
    scaling: float,
    error_scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    blocks: bool = False,
    exact_query: Tensor | None = None,
    exact_key: Tensor | None = None,
    shift: Tensor | None = None,
    row_error: Tensor | None = None,
    key_error: Tensor | None = None,
    bridge: BridgeNorms | None = None,
    residual: ResidualPath | None = None,
    draws: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Attend with low-precision scores, recomputing in float32 those whose weight exceeds the threshold.

    The score of a query and a key is y = round(scaling * low-precision q . k) + shift. A recomputed one is
    scaling * (exact q . exact k) + shift in float32. The rule, the softcap and its slope see y, shift included.

    Parameters
    ----------
    query, key, value
        float32 (B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv).
    accumulation
        How the scores are summed.
    weight, threshold, by_length
        The rule, as `torchlamp.rules.ThresholdForm` describes it.
    scaling
        Factor of the scores.
    error_scale
        For the weights `running` and `running-residual`: r = error_scale * sqrt(sum of squares), the expected error of
        the sum. For those with a bridge, see `BridgeNorms`.
    mask
        bool (B or 1, 1, Lq, Lk), True = visible, or None.
    causal
        Query i sees keys 0..i. Not together with `mask`.
    softcap
        c > 0: logits are c tanh(score / c).
    sinks
        float32 (H,): a logit per head that enters the normaliser but has no value.
    blocks
        Also note which blocks of 16 keys a row sees and touches.
    exact_query, exact_key
        float32, of the shapes of `query` and `key`: the operands of recomputed scores, where those of the low pass are
        coarser copies of them. `query` and `key` themselves if not given.
    shift
        float32 (B, H, Lq), added in float32 to every score of a row, after scaling and rounding: what a representative
        lacks. A softmax alone doesn't see it; a softcap and sinks do.
    row_error, key_error
        float32 (B, H, Lq) and (B, Hkv, Lk), together: their product is the expected error of a score that coarser
        operands make, scaling included. For the weight `running`
        r = sqrt((error_scale * sqrt(sum of squares))^2 + (row_error * key_error)^2), and row_error * key_error alone
        where sums are float32 ones.
    bridge
        With the weights `bridge` and `bridge-residual`, and only with them.
    residual
        With the weights `running-residual` and `bridge-residual`, and only with them.
    draws
        float32 (H, Lq, Lk) in [0, 1), shared by the samples: of every row as many entries are recomputed as the weight
        selects, but those visible with the lowest draws, equal draws in the order of their keys.

    Returns
    -------
    Output float32 (B, Lq, H, Dv); recomputed entries int32 (B, H, Lq); int32 (B, Lq, 2): how many keys each query
    sees, and the index of the last one (-1: none); if asked for, uint8 (B, H, Lq, ceil(Lk / 16)): 1 for a block with a
    visible key, plus 2 if one of them is recomputed. Or None where no fused kernel serves: no extension, tensors that
    are neither float32 on the CPU nor on a GPU with Triton, a mask for each head, the weight `relaxed` with sinks, or
    a unit with groups; with Triton also `row_error`, `bridge`, `residual` and `draws`.

    Raises
    ------
    ValueError
        Shapes that don't fit together, one of `row_error` and `key_error` without the other, or a weight without the
        `bridge` or `residual` that it needs.
    """
    served = serves(accumulation, weight, mask, causal, sinks)
    ahead = (draws, *(bridge or ())[:2], *(residual or ()))
    optional = (exact_query, exact_key, shift, row_error, key_error, *ahead)
    on_gpu = row_error is None and all(tensor is None for tensor in ahead)
    if served and on_gpu and gpu_for(query, key, value, mask, sinks, *optional):
        from torchlamp.kernels.gpu.attention import attention_gpu

        how = (weight, threshold, by_length, scaling, error_scale, mask, causal, softcap, sinks, blocks)
        return attention_gpu(query, key, value, accumulation, *how, exact_query, exact_key, shift)
    native = native_for(query, key, value, mask, sinks, *optional) if served else None
    if native is None:
        return None
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1])
    selected = torch.empty(batch, heads, length, dtype=torch.int32)
    visible = torch.empty(batch, length, 2, dtype=torch.int32)
    noted = None
    if blocks:
        noted = torch.zeros(batch, heads, length, -(-key.shape[2] // BLOCK_KEYS), dtype=torch.uint8)
    native.extension.attention(
        native.instruction_set,
        *map(as_native, (query, key, value)),
        *(None if t is None else as_native(t) for t in (exact_query, exact_key)),
        *(None if t is None else as_native(t, "all") for t in (shift, row_error, key_error)),
        output,
        selected,
        visible,
        noted,
        None if mask is None else as_native(mask[:, 0].expand(batch, -1, -1)),
        None if sinks is None else as_native(sinks, "all"),
        causal,
        scaling,
        softcap or 0.0,
        RULE_WEIGHTS.index(weight),
        threshold,
        by_length,
        error_scale,
        None if bridge is None else (*(as_native(t, "all") for t in bridge[:2]), *bridge[2:]),
        None if residual is None else _as_native(residual),
        None if draws is None else as_native(draws, "all"),
        accumulation_numbers(accumulation),
        torch.get_num_threads(),
    )
    return output, selected, visible, noted


def _as_native(residual: ResidualPath) -> tuple[Tensor, ...]:
    """The tensors as the kernel reads them: of the mapped values any strides but the last."""
    return tuple(as_native(t, "last" if t is residual.mapped else "all") for t in residual)
