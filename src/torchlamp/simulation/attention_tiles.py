"""Attention tile by tile: the readable form, for every rule, mask and device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.constants import BLOCK_KEYS
from torchlamp.kernels.products import products
from torchlamp.kernels.recompute import recompute
from torchlamp.kernels.specification import Accumulation, Grid
from torchlamp.rules.tile import Tile
from torchlamp.simulation.ahead import SampleDistances, bridge_error
from torchlamp.simulation.attention_call import AttentionCall, AttentionResult, Observation
from torchlamp.simulation.blocks import mark_blocks
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
from torchlamp.simulation.values import Values, weighted_sums
from torchlamp.simulation.visibility import Window, window

_FLOAT32 = Accumulation(Grid())

#: Query rows of a tile: enough to keep matrix products busy, few enough that memory grows with keys only.
TILE_ROWS = 64


def tiled_attention(call: AttentionCall, operands: ScoreOperands, value: Tensor) -> AttentionResult:
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
        )
        for first in range(0, queries, TILE_ROWS):
            rows = range(first, min(first + TILE_ROWS, queries))
            at = slice(rows.start, rows.stop)
            seen = window(call.seen, sample, rows, key.shape[2], query.device)
            if seen.last > seen.first:
                weigh_tile = _tile if sources.keys is None else _stored_tile
                weighed = weigh_tile(call, sources, sample, rows, seen)
                out, counts = _values(sources.values, weighed, sources, seen)
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
    #: How these values are summed.
    values: Values | StoredValues | None
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
    lacking = operands.lacking(sample, at, shown)
    causal = rows.start - seen.first if call.seen.causal else None
    scores, squares = products(
        query,
        keys,
        call.accumulator.accumulation,
        scaling=call.scaling,
        causal=causal,
        squares="squares" in call.rule.byproducts,
    )
    if lacking is not None:
        scores += lacking
    visible = seen.visible
    if visible is None:
        visible = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device).expand(1, *scores.shape[1:])
    hidden = None if seen.visible is None else ~visible
    bias = _bias(call.seen.bias, sample, rows, seen)

    logits, slope = capped_logits(scores, call.softcap, bias)
    probabilities = visible_softmax(logits, hidden, call.sinks)

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
        # The walk that was rounded ends at the narrow sum, without what is added to it in float32.
        sums = scores if lacking is None else scores - lacking
        unit = call.accumulator.unit_roundoff_of_a_product
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
    )
    chosen = call.rule.select(tile)[0]
    if call.observe is not None:
        call.observe(Observation(sample, rows, seen.first, tile, chosen[None]))
    if bool(chosen.any()):
        del tile, logits, slope, probabilities, squares
        recompute(scores, exact_query, exact_keys, chosen, call.scaling)
        if lacking is not None:
            scores = torch.where(chosen, scores + lacking, scores)
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
