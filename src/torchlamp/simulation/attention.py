"""Softmax attention under a policy: low-precision scores, look-ahead, recomputation, softmax, values.

References
----------
Budzinskiy et al., look-ahead mixed precision, arXiv 2601.21623, the composition softmax(q k^T). The running
error estimate is derived in docs/method.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.transforms import Transform
from torchlamp.kernels.attention import fused_attention
from torchlamp.kernels.constants import BLOCK_KEYS
from torchlamp.kernels.products import products
from torchlamp.kernels.recompute import recompute
from torchlamp.kernels.specification import Accumulation, Grid
from torchlamp.rules.rule import Rule
from torchlamp.rules.tile import Tile
from torchlamp.simulation.ahead import Ahead, SampleDistances, bridge_error
from torchlamp.simulation.blocks import mark_blocks
from torchlamp.simulation.score_operands import ScoreMoments, ScoreOperands, score_operands
from torchlamp.simulation.softmax import capped_logits, visible_softmax
from torchlamp.simulation.stored_attention import (
    KeyStorage,
    Softmax,
    StoredKeys,
    StoredValues,
    Weighed,
    apply,
    stored_sums,
    weigh,
)
from torchlamp.simulation.values import Values, weighted_sums
from torchlamp.simulation.visibility import Visibility, Window, window

_FLOAT32 = Accumulation(Grid())
_AS_THEY_ARE = Operand()

#: Query rows of a tile: enough to keep matrix products busy, few enough that memory grows with keys only.
TILE_ROWS = 64


@dataclass(frozen=True)
class AttentionResult:
    """What an attention call returns.

    Attributes
    ----------
    output : Tensor
        float32 (batch, queries, heads, value size), contiguous.
    eligible, selected : Tensor
        int64 (batch, heads, queries): visible keys of each row, and how many of its scores were recomputed.
    last_key : Tensor
        int64 (batch, queries): index of the last key that any head of the query sees, -1 where none does.
    values_selected : Tensor or None
        int64 (batch, heads, queries): how many numbers of each row's output were recomputed, if values are summed in
        low precision.
    blocks : Tensor or None
        uint8 (batch, heads, queries, ceil(keys / 16)), if asked for: the marks of `torchlamp.simulation.blocks`.
    """

    output: Tensor
    eligible: Tensor
    selected: Tensor
    last_key: Tensor
    values_selected: Tensor | None = None
    blocks: Tensor | None = None


@dataclass(frozen=True)
class Observation:
    """What an observer sees of a tile, after the selection and before the recomputation.

    The tensors of `tile` and `chosen` are (1, heads, rows, keys). The tile's scores change after the call: an observer
    copies what it keeps and asks the tile before it returns.
    """

    sample: int
    rows: range
    #: Number of the tile's first key.
    first_key: int
    tile: Tile
    #: bool: the entries that will be recomputed.
    chosen: Tensor

    @property
    def exact(self) -> Tensor:
        """The visible scores in float32, as the recomputation gives them; (1, heads, rows, keys)."""
        return self.tile.exact


@dataclass(frozen=True)
class AttentionCall:
    """How an attention runs: all that is given beside query, key and value, see `attention`."""

    accumulator: Accumulator
    rule: Rule
    #: Factor of the scores, commonly 1 / sqrt(size).
    scaling: float
    #: Mask, causality and bias.
    seen: Visibility = field(default_factory=Visibility)
    #: c > 0: logits are c tanh(score / c). None: no softcap.
    softcap: float | None = None
    #: float32 (heads,): a logit per head that enters the normaliser but has no value.
    sinks: Tensor | None = None
    #: On the CPU; needed by random rules. Every sample starts from the state it has now.
    generator: torch.Generator | None = None
    #: Called with an `Observation` of every tile that sees a key; the fused kernel, which has no tiles, is not used.
    observe: Callable[[Observation], None] | None = None
    #: How the values are summed, or read; None: in float32.
    values: Values | StoredValues | None = None
    #: How queries and keys are stored in the low pass.
    operand: Operand = _AS_THEY_ARE
    #: Exact changes of queries and keys before they are stored or summed, in the order they are applied.
    transforms: tuple[Transform, ...] = ()
    #: Calibrated statistics that the transforms are fitted to; None: those of the call's own queries and keys.
    moments: ScoreMoments | None = None
    #: How the keys are stored; the accumulator isn't used then. None: as they are.
    keys: KeyStorage | None = None
    #: What follows the heads' outputs; rules that look as far as the residual stream need it.
    ahead: Ahead | None = None
    #: Number of the layer, for rules that choose by it.
    layer: int = 0
    #: Whether to mark which blocks of 16 keys are seen and touched.
    blocks: bool = False

    @property
    def error_scale(self) -> float:
        """Factor from the root of a running sum of squares to the expected error of a score."""
        return self.accumulator.format.unit_roundoff / 2 * abs(self.scaling)


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
        Shapes that don't fit, softcap <= 0, a random rule without a generator, a rule that looks to the residual
        stream without `ahead`.
    """
    _check(query, key, value, call)
    call.seen.check((*query.shape[:3], key.shape[2]))
    operands = _operands(call, query, key)
    return _fused(call, operands, value) or _tiled(call, operands, value)


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
    )


def _fused(call: AttentionCall, operands: ScoreOperands, value: Tensor) -> AttentionResult | None:
    """The whole call in one native kernel, for rules that have a threshold form and where it can serve."""
    form = call.rule.threshold_form()
    plain = call.seen.bias is None and call.observe is None and call.values is None and call.keys is None
    # The expected error of two coarser operands is no product of one number a row and one a key.
    if form is None or not plain or (operands.is_quantised and "squares" in call.rule.byproducts):
        return None
    result = fused_attention(
        operands.query,
        operands.key,
        value,
        call.accumulator.accumulation,
        weight=form.weight,
        threshold=form.threshold,
        by_length=form.by_length,
        scaling=call.scaling,
        error_scale=call.error_scale,
        mask=call.seen.mask,
        causal=call.seen.causal,
        softcap=call.softcap,
        sinks=call.sinks,
        blocks=call.blocks,
        exact_query=operands.exact_query if operands.is_quantised else None,
        exact_key=operands.exact_key if operands.is_quantised else None,
        shift=operands.shift,
    )
    if result is None:
        return None
    output, selected, visible, marks = result
    eligible = visible[:, None, :, 0].to(torch.int64).expand(selected.shape)
    last_key = visible[:, :, 1].to(torch.int64)
    return AttentionResult(output, eligible, selected.to(torch.int64), last_key, blocks=marks)


def _tiled(call: AttentionCall, operands: ScoreOperands, value: Tensor) -> AttentionResult:
    """The readable form, for every rule, mask and device: a loop over tiles of query rows."""
    query, key = operands.query, operands.key
    batch, heads, queries, _ = query.shape
    generator, sinks = call.generator, call.sinks
    output = query.new_empty(batch, queries, heads, value.shape[-1])
    eligible = torch.zeros(batch, heads, queries, dtype=torch.int64, device=query.device)
    selected = torch.zeros_like(eligible)
    last_key = torch.full((batch, queries), -1, dtype=torch.int64, device=query.device)
    values_selected = None
    if call.values is not None:
        counted_heads = key.shape[1] if isinstance(call.values, StoredValues) else heads
        values_selected = selected.new_zeros(batch, counted_heads, queries)
    marks = None
    if call.blocks:
        counted = (batch, heads, queries, -(-key.shape[2] // BLOCK_KEYS))
        marks = torch.zeros(counted, dtype=torch.uint8, device=query.device)
    drawn_from = (generator, None if call.values is None else call.values.generator)
    generators = [g for g in drawn_from if g is not None]
    starts = [g.get_state() for g in generators]
    for sample in range(batch):
        for own, start in zip(generators, starts, strict=True):
            own.set_state(start)
        sources = _Sources(
            operands,
            value[sample],
            SampleDistances(value[sample], heads, call.ahead),
            None if call.keys is None else call.keys.store(query[sample], key[sample], sample),
            None if call.values is None else call.values.stored(value[sample]),
        )
        for first in range(0, queries, TILE_ROWS):
            rows = range(first, min(first + TILE_ROWS, queries))
            at = slice(rows.start, rows.stop)
            seen = window(call.seen, sample, rows, key.shape[2], query.device)
            if seen.last > seen.first:
                weigh_tile = _tile if sources.keys is None else _stored_tile
                weighed = weigh_tile(call, sources, sample, rows, seen)
                out, counts = _values(call.values, weighed, sources, seen)
                if values_selected is not None and counts is not None:
                    values_selected[sample, :, at] = counts
                eligible[sample, :, at] = weighed.visible.sum(dim=-1)
                selected[sample, :, at] = weighed.chosen.sum(dim=-1)
                if marks is not None:
                    marks[sample, :, at] = mark_blocks(
                        weighed.visible, weighed.chosen, seen.first, key.shape[2]
                    )
                last_key[sample, at] = _last_visible(weighed.visible, seen.first)
            else:
                out = query.new_zeros(heads, len(rows), value.shape[-1])
            if seen.visible is not None or seen.last == seen.first:
                _fill_blind_rows(out, eligible[sample, :, at] == 0, value[sample], sinks)
            output[sample, at] = out.transpose(0, 1)
    return AttentionResult(output, eligible, selected, last_key, values_selected, marks)


@dataclass(frozen=True)
class _Sources:
    """What all tiles of one sample read: scores' operands, values (key heads, keys, size), and how they are stored."""

    operands: ScoreOperands
    value: Tensor
    distances: SampleDistances
    keys: StoredKeys | None
    #: The numbers that the stored values stand for.
    low_value: Tensor | None


def _values(
    how: Values | StoredValues | None, weighed: Weighed, sources: _Sources, seen: Window
) -> tuple[Tensor, Tensor | None]:
    """Sums of the values of a tile, and what of them was recomputed or read in full."""
    shown = sources.value[:, seen.first : seen.last]
    if how is None or sources.low_value is None:
        return apply(weighed.probabilities, shown), None
    if isinstance(how, StoredValues):
        return stored_sums(weighed, shown, sources.low_value[:, seen.first : seen.last], how)
    return weighted_sums(weighed.probabilities, shown, how, sources.low_value, seen.first)


def _stored_tile(call: AttentionCall, sources: _Sources, sample: int, rows: range, seen: Window) -> Weighed:
    """The same as `_tile`, from stored keys."""
    assert sources.keys is not None
    query = sources.operands.query[sample, :, rows.start : rows.stop]
    shown = slice(seen.first, seen.last)
    scores, error = sources.keys.scores(query, seen.first, seen.last, call.scaling)

    def distances(probabilities: Tensor, ahead: bool) -> Tensor:
        outputs = apply(probabilities, sources.value[:, shown])
        given = (probabilities, outputs, seen.first, seen.last, sample, rows)
        return (sources.distances.ahead if ahead else sources.distances.output).of(*given)

    def observe(tile: Tile, chosen: Tensor) -> None:
        if call.observe is not None:
            call.observe(Observation(sample, rows, seen.first, tile, chosen))

    visible = seen.visible
    if visible is None:
        visible = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device).expand(1, *scores.shape[1:])
    return weigh(
        scores,
        error,
        query,
        sources.operands.key[sample, :, shown].transpose(1, 2),
        visible,
        Softmax(call.softcap, _bias(call.seen.bias, sample, rows, seen), call.sinks),
        rule=call.rule,
        scaling=call.scaling,
        generator=call.generator,
        layer=call.layer,
        distances=distances,
        observe=observe,
    )


def _tile(call: AttentionCall, sources: _Sources, sample: int, rows: range, seen: Window) -> Weighed:
    """Probabilities, visible and selected of one tile."""
    value, distances, operands = sources.value, sources.distances, sources.operands
    at, shown = slice(rows.start, rows.stop), slice(seen.first, seen.last)
    query, keys = operands.query[sample, :, at], operands.key[sample, :, shown].transpose(1, 2)
    exact_query = operands.exact_query[sample, :, at]
    exact_keys = operands.exact_key[sample, :, shown].transpose(1, 2)
    shift = None if operands.shift is None else operands.shift[sample, :, at, None]
    causal = rows.start - seen.first if call.seen.causal else None
    scores, squares = products(
        query,
        keys,
        call.accumulator.accumulation,
        scaling=call.scaling,
        causal=causal,
        squares="squares" in call.rule.byproducts,
    )
    if shift is not None:
        scores += shift
    visible = seen.visible
    if visible is None:
        visible = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device).expand(1, *scores.shape[1:])
    hidden = None if seen.visible is None else ~visible
    bias = _bias(call.seen.bias, sample, rows, seen)

    logits, slope = capped_logits(scores, call.softcap, bias)
    probabilities = visible_softmax(logits, hidden, call.sinks)

    def exact() -> Tensor:
        sums, _ = products(exact_query, exact_keys, _FLOAT32, scaling=call.scaling, causal=causal)
        return (sums if shift is None else sums + shift)[None]

    def error() -> Tensor:
        assert squares is not None
        rounding = squares.sqrt().mul_(call.error_scale)
        coarse = operands.quantisation_error(sample, at, shown, call.scaling)
        return (rounding if coarse is None else torch.hypot(rounding, coarse))[None]

    def distance(ahead: bool) -> Tensor:
        outputs = apply(probabilities, value[:, seen.first : seen.last])
        given = (probabilities, outputs, seen.first, seen.last, sample, rows)
        return (distances.ahead if ahead else distances.output).of(*given)[None]

    unit = call.accumulator.format.unit_roundoff
    tile = Tile(
        scores=scores[None],
        logits=logits[None],
        probabilities=probabilities[None],
        visible=visible.expand(scores.shape)[None],
        slope=None if slope is None else slope[None],
        error=None if squares is None else error,
        bridge_error=lambda: bridge_error(query, keys, scores, call.scaling, unit)[None],
        generator=call.generator,
        exact=exact,
        distance=None if call.ahead is None else lambda: distance(True),
        output_distance=lambda: distance(False),
        layer=call.layer,
    )
    chosen = call.rule.select(tile)[0]
    if call.observe is not None:
        call.observe(Observation(sample, rows, seen.first, tile, chosen[None]))
    if bool(chosen.any()):
        del tile, logits, slope, probabilities, squares
        recompute(scores, exact_query, exact_keys, chosen, call.scaling)
        if shift is not None:
            scores = torch.where(chosen, scores + shift, scores)
        logits, _ = capped_logits(scores, call.softcap, bias)
        probabilities = visible_softmax(logits, hidden, call.sinks)
    return Weighed(probabilities, visible, chosen)


def _bias(bias: Tensor | None, sample: int, rows: range, seen: Window) -> Tensor | None:
    if bias is None:
        return None
    own = bias[sample if bias.shape[0] > 1 else 0]
    return own[:, rows.start : rows.stop, seen.first : seen.last]


def _last_visible(visible: Tensor, first: int) -> Tensor:
    """Index of the last key each query sees in any head, -1 where none."""
    index = torch.arange(1, visible.shape[-1] + 1, device=visible.device)
    last = (visible * index).amax(dim=(0, 2))
    return torch.where(last > 0, last + (first - 1), -1)


def _fill_blind_rows(out: Tensor, blind: Tensor, value: Tensor, sinks: Tensor | None) -> None:
    """Give rows without any visible key the mean of all values; a sink, if any, takes all their weight."""
    if sinks is not None or not bool(blind.any()):
        return
    mean = value.mean(dim=1).repeat_interleave(out.shape[0] // value.shape[0], dim=0)
    out[blind] = mean[:, None, :].expand_as(out)[blind]


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
