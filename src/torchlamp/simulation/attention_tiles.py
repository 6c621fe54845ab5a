"""Attention tile by tile: the readable form, for every rule, mask and device."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.tender import CHUNK
from torchlamp.kernels import reference_softmax
from torchlamp.kernels.constants import BLOCK_KEYS
from torchlamp.kernels.online import TILE_KEYS
from torchlamp.kernels.products import products
from torchlamp.kernels.recompute import recompute
from torchlamp.kernels.specification import Accumulation, Grid
from torchlamp.rules.block_view import BlockView
from torchlamp.rules.tile import Tile
from torchlamp.simulation.ahead import SampleDistances, bridge_error
from torchlamp.simulation.attention_call import AttentionCall, AttentionResult, Observation
from torchlamp.simulation.blocks import mark_blocks
from torchlamp.simulation.online_attention import (
    Answers,
    norm_products,
    online_scores,
    origin,
    weigh_online,
)
from torchlamp.simulation.score_operands import ScoreOperands
from torchlamp.simulation.softmax import capped_logits, visible_softmax
from torchlamp.simulation.stored_attention import (
    Softmax,
    StoredKeys,
    StoredValues,
    Weighed,
    apply,
    stored_sums,
    weigh,
)
from torchlamp.simulation.tile_counts import COUNTS
from torchlamp.simulation.values import Values, weighted_sums
from torchlamp.simulation.visibility import Window, window

_FLOAT32 = Accumulation(Grid())

#: Query rows of a tile: enough to keep matrix products busy, few enough that memory grows with keys only.
TILE_ROWS = 64


def tiled_attention(
    call: AttentionCall, operands: ScoreOperands, value: Tensor, as_kernel: bool = False
) -> AttentionResult:
    """The readable form, for every rule, mask and device: a loop over tiles of query rows.

    `as_kernel` takes the exponential and the sums of the native kernel, bit for bit, in twice the time.
    """
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
    # A chunk of Tender's probabilities is a tile.
    chunked = isinstance(call.values, Values) and call.values.operand.is_tender
    height, overflowed, values_overflowed = CHUNK if chunked else TILE_ROWS, 0, 0
    marks = None
    if call.blocks:
        counted = (batch, heads, queries, -(-key.shape[2] // BLOCK_KEYS))
        marks = torch.zeros(counted, dtype=torch.uint8, device=query.device)
    tiles = selected.new_zeros(COUNTS) if call.accumulator.online else None
    drawn_from = (generator, None if call.values is None else call.values.generator)
    generators = [g for g in drawn_from if g is not None]
    starts = [g.get_state() for g in generators]
    for sample in range(batch):
        for own, start in zip(generators, starts, strict=True):
            own.set_state(start)
        summed = call.values
        if isinstance(summed, Values):
            summed = summed.fitted(value[sample])
        sources = _Sources(
            operands,
            value[sample],
            SampleDistances(value[sample], heads, call.ahead),
            None if call.keys is None else call.keys.store(query[sample], key[sample], sample),
            summed,
            None if summed is None else summed.stored(value[sample]),
            origin(call.seen, sample) if call.accumulator.online else (0, 0),
            as_kernel,
        )
        for rows in _row_tiles(sources.origin[0], queries, height):
            at = slice(rows.start, rows.stop)
            seen = window(call.seen, sample, rows, key.shape[2], query.device)
            if seen.last > seen.first:
                weighed = _weigher(call)(call, sources, sample, rows, seen)
                out, counts, over = _values(sources.values, weighed, sources, seen)
                overflowed += weighed.overflowed
                values_overflowed += over
                if values_selected is not None and counts is not None:
                    values_selected[sample, :, at] = counts
                eligible[sample, :, at] = weighed.visible.sum(dim=-1)
                selected[sample, :, at] = weighed.chosen.sum(dim=-1)
                if tiles is not None and weighed.tiles is not None:
                    tiles += weighed.tiles
                if marks is not None:
                    marks[sample, :, at] = mark_blocks(
                        weighed.visible, weighed.chosen, seen.first, key.shape[2]
                    )
                last_key[sample, at] = _last_visible(weighed.visible, seen.first)
            else:
                out = query.new_zeros(heads, len(rows), value.shape[-1])
            if seen.visible is not None or seen.last == seen.first:
                _fill_blind_rows(out, eligible[sample, :, at] == 0, value[sample], sinks, as_kernel)
            output[sample, at] = out.transpose(0, 1)
    return AttentionResult(
        output,
        eligible,
        selected,
        last_key,
        values_selected,
        marks,
        overflowed=overflowed,
        values_overflowed=values_overflowed,
        tiles=tiles,
    )


def _row_tiles(first: int, queries: int, height: int) -> list[range]:
    """Query rows in tiles that begin at a row; the rows before it, which see nothing, in tiles of their own."""
    starts = [*range(0, first, height), *range(first, queries, height), queries]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


@dataclass(frozen=True)
class _Sources:
    """What all tiles of one sample read: scores' operands, values (key heads, keys, size), and how they are stored."""

    operands: ScoreOperands
    value: Tensor
    distances: SampleDistances
    keys: StoredKeys | None
    #: How these values are summed.
    values: Values | StoredValues | None
    #: The numbers that the stored values stand for.
    low_value: Tensor | None
    #: First row that sees a key and first key that is seen, where the tiles of an online softmax begin; else 0, 0.
    origin: tuple[int, int]
    #: Softmax and sums of values are those of the native kernel.
    as_kernel: bool


def _values(
    how: Values | StoredValues | None, weighed: Weighed, sources: _Sources, seen: Window
) -> tuple[Tensor, Tensor | None, int]:
    """Sums of the values of a tile, what of them was recomputed or read in full, and how many didn't fit a register."""
    shown = sources.value[:, seen.first : seen.last]
    if sources.as_kernel:
        return reference_softmax.weighted(weighed.probabilities, shown), None, 0
    if how is None or sources.low_value is None:
        return apply(weighed.probabilities, shown), None, 0
    if isinstance(how, StoredValues):
        return *stored_sums(weighed, shown, sources.low_value[:, seen.first : seen.last], how), 0
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


def _weigher(call: AttentionCall) -> Callable[[AttentionCall, _Sources, int, range, Window], Weighed]:
    """What gives the weights of a tile's values."""
    if call.keys is not None:
        return _stored_tile
    return _online_tile if call.accumulator.online else _tile


def _online_tile(call: AttentionCall, sources: _Sources, sample: int, rows: range, seen: Window) -> Weighed:
    """The same as `_tile`, in an online softmax; scores have no factor, queries have it already."""
    operands, at, shown = sources.operands, slice(rows.start, rows.stop), slice(seen.first, seen.last)
    query, key = operands.query[sample, :, at], operands.key[sample, :, shown]
    in_full = operands.exact_query[sample, :, at], operands.exact_key[sample, :, shown].mT
    causal = rows.start - seen.first if call.seen.causal else None
    lacking = operands.lacking(sample, at, shown)
    squares = "squares" in call.rule.byproducts
    scores = online_scores(
        (query, key.mT),
        in_full,
        call.accumulator.accumulation,
        call.accumulator.recomputation,
        causal=causal,
        squares=squares,
        generator=call.generator if call.accumulator.stochastic else None,
    )
    unit = call.accumulator.unit_roundoff_of_a_product

    def error(_: Tensor) -> Tensor:
        assert scores.squares is not None
        rounding = scores.squares.sqrt().mul_(call.error_scale)
        coarse = operands.quantisation_error(sample, at, shown, call.scaling)
        return rounding if coarse is None else torch.hypot(rounding, coarse)

    def exact(_: Tensor) -> Tensor:
        sums = products(*in_full, _FLOAT32, causal=causal)[0]
        return sums if lacking is None else sums + lacking

    def margin(_: Tensor) -> Tensor:
        return call.accumulator.unit_roundoff * norm_products(query, key)

    def distance(weights: Tensor, ahead: bool) -> Tensor:
        outputs = apply(weights, sources.value[:, shown])
        given = (weights, outputs, seen.first, seen.last, sample, rows)
        return (sources.distances.ahead if ahead else sources.distances.output).of(*given)

    answers: Answers = {
        "exact": exact,
        "margin": margin,
        "bridge_error": lambda low: bridge_error(query, key.mT, low, call.scaling, unit),
        "output_distance": lambda weights: distance(weights, False),
    }
    if squares:
        answers["error"] = error
    if call.ahead is not None:
        answers["distance"] = lambda weights: distance(weights, True)

    def observe(tile: Tile, chosen: Tensor) -> None:
        if call.observe is not None:
            call.observe(Observation(sample, rows, seen.first, tile, chosen))

    visible = seen.visible
    if visible is None:
        visible = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device).expand(1, *scores.low.shape[1:])
    return weigh_online(
        scores,
        visible,
        Softmax(call.softcap, _bias(call.seen.bias, sample, rows, seen), call.sinks),
        lacking,
        rule=call.rule,
        formats=call.accumulator.online_formats,
        offset=(seen.first - sources.origin[1]) % TILE_KEYS,
        layer=call.layer,
        generator=call.generator,
        answers=answers,
        observe=observe,
    )


def _tile(call: AttentionCall, sources: _Sources, sample: int, rows: range, seen: Window) -> Weighed:
    """Probabilities, visible and selected of one tile."""
    value, distances, operands = sources.value, sources.distances, sources.operands
    at, shown = slice(rows.start, rows.stop), slice(seen.first, seen.last)
    query, keys = operands.query[sample, :, at], operands.key[sample, :, shown].transpose(1, 2)
    exact_query = operands.exact_query[sample, :, at]
    exact_keys = operands.exact_key[sample, :, shown].transpose(1, 2)
    lacking = operands.lacking(sample, at, shown)
    causal = rows.start - seen.first if call.seen.causal else None
    low = operands.low_scores(
        sample, at, shown, call, causal=causal, squares="squares" in call.rule.byproducts
    )
    scores, squares = low.sums, low.squares
    if lacking is not None:
        scores += lacking
    visible = seen.visible
    if visible is None:
        visible = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device).expand(1, *scores.shape[1:])
    overflowed = 0 if low.overflowed is None else int((low.overflowed & visible).sum())
    hidden = None if seen.visible is None else ~visible
    bias = _bias(call.seen.bias, sample, rows, seen)

    def softmax() -> tuple[Tensor, Tensor | None, Tensor]:
        if sources.as_kernel:
            logits, slope = reference_softmax.capped(scores, call.softcap)
            return logits, slope, reference_softmax.softmax(logits, hidden, call.sinks, seen.first)
        logits, slope = capped_logits(scores, call.softcap, bias)
        return logits, slope, visible_softmax(logits, hidden, call.sinks)

    logits, slope, probabilities = softmax()

    def exact() -> Tensor:
        sums, _ = products(exact_query, exact_keys, _FLOAT32, scaling=call.scaling, causal=causal)
        return (sums if lacking is None else sums + lacking)[None]

    def error() -> Tensor:
        assert squares is not None
        rounding = squares.sqrt().mul_(call.error_scale)
        coarse = operands.quantisation_error(sample, at, shown, call.scaling)
        return (rounding if coarse is None else torch.hypot(rounding, coarse))[None]

    def distance(ahead: bool) -> Tensor:
        outputs = apply(probabilities, value[:, seen.first : seen.last])
        given = (probabilities, outputs, seen.first, seen.last, sample, rows)
        return (distances.ahead if ahead else distances.output).of(*given)[None]

    def bridge() -> Tensor:
        # The walk that was rounded ends before a key's own sum is added in float32.
        column, unit = operands.column_shift, call.accumulator.unit_roundoff_of_a_product
        sums = scores if column is None else scores - column[sample, :, None, shown]
        return bridge_error(query, keys, sums, call.scaling, unit)[None]

    tile = Tile(
        scores=scores[None],
        logits=logits[None],
        probabilities=probabilities[None],
        visible=visible.expand(scores.shape)[None],
        slope=None if slope is None else slope[None],
        error=None if squares is None else error,
        bridge_error=bridge,
        generator=call.generator,
        exact=exact,
        distance=None if call.ahead is None else lambda: distance(True),
        output_distance=lambda: distance(False),
        layer=call.layer,
        blocks=BlockView(
            exact_query,
            operands.exact_key[sample, :, shown],
            rows.start,
            seen.first,
            operands.query.shape[2],
            operands.key.shape[2],
        ),
    )
    chosen = call.rule.select(tile)[0]
    if call.observe is not None:
        call.observe(Observation(sample, rows, seen.first, tile, chosen[None]))
    if bool(chosen.any()):
        del tile, logits, slope, probabilities, squares
        recompute(scores, exact_query, exact_keys, chosen, call.scaling)
        if lacking is not None:
            scores = torch.where(chosen, scores + lacking, scores)
        _, _, probabilities = softmax()
    return Weighed(probabilities, visible, chosen, overflowed=overflowed)


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


def _fill_blind_rows(
    out: Tensor, blind: Tensor, value: Tensor, sinks: Tensor | None, as_kernel: bool
) -> None:
    """Give rows without any visible key the mean of all values; a sink, if any, takes all their weight."""
    if sinks is not None or not bool(blind.any()):
        return
    own = reference_softmax.mean_of_all(value) if as_kernel else value.mean(dim=1)
    mean = own.repeat_interleave(out.shape[0] // value.shape[0], dim=0)
    out[blind] = mean[:, None, :].expand_as(out)[blind]
