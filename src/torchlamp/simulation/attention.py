"""Softmax attention under a policy: low-precision scores, look-ahead, recomputation, softmax, values.

References
----------
Budzinskiy et al., look-ahead mixed precision, arXiv 2601.21623, the composition softmax(q k^T). The running
error estimate is derived in docs/method.md.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.rules.rule import Rule
from torchlamp.simulation.attention_call import AttentionCall, AttentionResult
from torchlamp.simulation.attention_fused import fused, fused_elsewhere
from torchlamp.simulation.attention_tiles import tiled_attention
from torchlamp.simulation.doubt import doubt
from torchlamp.simulation.score_operands import ScoreOperands, score_operands
from torchlamp.simulation.visibility import Visibility


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    accumulator: Accumulator,
    rule: Rule,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    **others: Any,
) -> AttentionResult:
    """Attend with scores accumulated in low precision and the selected ones recomputed in float32.

    The same as `attend`, with the call's parts by name.

    Parameters
    ----------
    query, key, value : Tensor
        As for `attend`.
    accumulator, rule, scaling
        As in `AttentionCall`: how scores are summed, which are recomputed, and their factor.
    mask : Tensor or None
        bool (batch or 1, heads or 1, queries, keys), True = visible.
    causal : bool
        Query i sees keys 0..i only.
    bias : Tensor or None
        float32, shape as `mask`, added to the logits after softcap.
    **others
        Any other field of `AttentionCall`: softcap, sinks, generator, observe, values, ahead, layer, blocks.

    Raises
    ------
    TypeError, ValueError
        As for `attend`.
    """
    seen = Visibility(mask, causal, bias)
    return attend(query, key, value, AttentionCall(accumulator, rule, scaling, seen, **others))


def attend(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionResult:
    """Attend with scores accumulated in low precision and the selected ones recomputed in float32.

    The scores of a tile of query rows are accumulated, multiplied by `scaling` in float32 and rounded again;
    softcap, bias, mask and softmax follow in float32. From these the rule selects entries, which are computed
    again in float32; the softmax is repeated and applied to the values in float32. Keys are never repeated
    for grouped queries, nothing of size queries x keys is stored, and each sample is computed on its own, so
    that results don't depend on the batch.

    A query that sees no key gets uniform weights over all keys (zero weights if there are sinks), as an
    additive mask with a very negative number gives; such rows have 0 eligible entries.

    Parameters
    ----------
    query : Tensor
        float32 (batch, heads, queries, size).
    key, value : Tensor
        float32 (batch, key heads, keys, size) and (batch, key heads, keys, value size); heads must be a
        multiple of key heads, query head h uses key head h // (heads / key heads).
    call : AttentionCall
        How.

    Raises
    ------
    TypeError
        Anything but float32 (bool for the mask).
    ValueError
        Shapes that don't fit, softcap <= 0, a random rule or rounding without a generator, a rule that looks to the
        residual stream without `ahead` or through an online softmax without one.
    """
    _check(query, key, value, call)
    call.seen.check((*query.shape[:3], key.shape[2]))
    if call.accumulator.online:
        # The factor acts before anything is summed, so that narrow sums have the range of logits.
        query, call = query * call.scaling, replace(call, scaling=1.0)
    operands = _operands(call, query, key)
    result = fused(call, operands, value)
    if result is None:
        result = tiled_attention(call, operands, value, fused_elsewhere(call, operands, value))
    return replace(result, doubt=doubt(call, operands))


def _operands(call: AttentionCall, query: Tensor, key: Tensor) -> ScoreOperands:
    """What the scores of a call are formed of."""
    return score_operands(
        query,
        key,
        operand=call.operand,
        transforms=call.transforms,
        scaling=call.scaling,
        wants_shift=call.softcap is not None or call.sinks is not None,
        moments=call.moments,
        accumulator=call.accumulator,
        ranges=call.ranges,
    )


def _check(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
    _check_operands(query, key, value)
    rule, softcap, sinks = call.rule, call.softcap, call.sinks
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: it must be positive, or None")
    if sinks is not None and sinks.dtype != torch.float32:
        raise TypeError(f"sinks is {sinks.dtype}: attention simulates from float32, convert it first")
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise ValueError(f"sinks of shape {tuple(sinks.shape)}: one logit for each of {query.shape[1]} heads")
    if rule.needs_generator and call.generator is None:
        raise ValueError(f"rule {str(rule)!r} draws random numbers: pass a generator")
    if call.accumulator.stochastic and call.generator is None:
        raise ValueError(f"accumulator '{call.accumulator}' draws random numbers: pass a generator")
    if rule.looks_through == "online" and not call.accumulator.online:
        raise ValueError(
            f"rule '{rule}' needs an accumulator with an online softmax, not '{call.accumulator}'"
        )
    if rule.reads_residual_stream and call.ahead is None:
        raise ValueError(
            f"rule {str(rule)!r} looks through the output projection to the residual stream: pass ahead"
        )


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}: attention simulates from float32, convert it first")
        if tensor.ndim != 4:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected (batch, heads, length, size)")
    fits = (
        query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and key.shape[2] == value.shape[2]
        and query.shape[3] == key.shape[3]
        and query.shape[1] % key.shape[1] == 0
    )
    if not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(
            f"query, key, value of shapes {shapes} don't fit: batch, heads, keys and size must agree"
        )
