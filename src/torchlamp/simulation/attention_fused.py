"""A whole attention call in the native kernel, for rules that have a threshold form.

What a rule must know beside the scores is formed here: norms for a bridge, the way to the residual stream, draws.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchlamp.kernels.attention import BridgeNorms, ResidualPath, fused_attention, serves
from torchlamp.kernels.constants import BLOCK_KEYS
from torchlamp.kernels.dispatch import native_for
from torchlamp.rules.threshold import ThresholdForm
from torchlamp.simulation.ahead import Ahead
from torchlamp.simulation.attention_call import AttentionCall, AttentionResult
from torchlamp.simulation.attention_tiles import TILE_ROWS
from torchlamp.simulation.score_operands import ScoreOperands
from torchlamp.simulation.visibility import window

#: What the kernel returns: output, selected, visible and marks.
_Returned = tuple[Tensor, Tensor, Tensor, Tensor | None]
#: Selects nothing, whatever the values are.
_NOTHING = ThresholdForm("topz", math.inf)


def fused(call: AttentionCall, operands: ScoreOperands, value: Tensor) -> AttentionResult | None:
    """The whole call in the native kernel; None where the rule has no threshold form or the kernel can't serve."""
    form = _form(call, operands, value)
    if form is None:
        return None
    # Weights that look further, and draws, are the native kernel's; the others are the GPU's, too.
    further = form.drawn or "bridge" in form.weight or "residual" in form.weight
    if further and native_for(operands.query, operands.key, value) is None:
        return None
    returned = _call(call, form, _Inputs(operands, value))
    if returned is None:
        return None
    output, selected, visible, marks = returned
    eligible = visible[:, None, :, 0].to(torch.int64).expand(selected.shape)
    last_key = visible[:, :, 1].to(torch.int64)
    return AttentionResult(output, eligible, selected.to(torch.int64), last_key, blocks=marks)


def fused_elsewhere(call: AttentionCall, operands: ScoreOperands, value: Tensor) -> bool:
    """Whether a call on the CPU that no kernel serves here is one that the native kernel serves where it is."""
    form = _form(call, operands, value)
    if form is None or not value.is_cpu:
        return False
    return serves(call.accumulator.accumulation, form.weight, call.seen.mask, call.seen.causal, call.sinks)


def _form(call: AttentionCall, operands: ScoreOperands, value: Tensor) -> ThresholdForm | None:
    """The rule's threshold form; None where it has none, or the call wants what the kernel doesn't do."""
    plain = call.seen.bias is None and call.observe is None and call.values is None and call.keys is None
    plain = plain and not call.accumulator.online and operands.low_query is None
    plain = plain and operands.column_shift is None and operands.key.shape[1] == value.shape[1]
    # The expected error of two coarser operands is no product of one number a row and one a key.
    if not plain or (operands.is_quantised and "squares" in call.rule.byproducts):
        return None
    return call.rule.threshold_form()


def _call(call: AttentionCall, form: ThresholdForm, inputs: "_Inputs") -> _Returned | None:
    if 0 in (*inputs.operands.query.shape[:3], inputs.value.shape[2]):
        return _run(call, _NOTHING, inputs, call.seen.mask)
    if "residual" in form.weight:
        assert call.ahead is not None
        ahead = _with_residual(call, call.ahead, inputs)
        if ahead is None:
            return None
        inputs = ahead
    if "bridge" in form.weight:
        inputs = _with_bridge(call, inputs)
    return _drawn(call, form, inputs) if form.drawn else _run(call, form, inputs, call.seen.mask)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """The tensors of a call: operands, values, and what the weight of the rule must know beside them."""

    operands: ScoreOperands
    value: Tensor
    bridge: BridgeNorms | None = None
    residual: ResidualPath | None = None

    def part(self, sample: int, rows: slice, keys: slice) -> "_Inputs":
        """Those of some rows and keys of one sample."""
        own, one = self.operands, slice(sample, sample + 1)
        query, key = own.query[one, :, rows], own.key[one, :, keys]
        coarse = own.is_quantised
        operands = ScoreOperands(
            query,
            key,
            own.exact_query[one, :, rows] if coarse else query,
            own.exact_key[one, :, keys] if coarse else key,
            None if own.shift is None else own.shift[one, :, rows],
        )
        bridge, residual = self.bridge, self.residual
        if bridge is not None:
            of_query, of_key, *factors = bridge
            bridge = BridgeNorms(of_query[one, :, rows], of_key[one, :, keys], *factors)
        if residual is not None:
            mapped, squares = residual.mapped[one, :, keys], residual.squares[one, :, keys]
            residual = ResidualPath(residual.factor, mapped, squares, residual.scale[one, rows])
        return _Inputs(operands, self.value[one, :, keys], bridge, residual)


def _run(
    call: AttentionCall, form: ThresholdForm, inputs: _Inputs, mask: Tensor | None, **others: Any
) -> _Returned | None:
    """One call of the kernel; `others` are arguments of it that replace the call's own."""
    operands = inputs.operands
    arguments: dict[str, Any] = {
        "weight": form.weight,
        "threshold": form.threshold,
        "by_length": form.by_length,
        "scaling": call.scaling,
        "error_scale": call.error_scale,
        "mask": mask,
        "causal": call.seen.causal,
        "softcap": call.softcap,
        "sinks": call.sinks,
        "blocks": call.blocks,
        "exact_query": operands.exact_query if operands.is_quantised else None,
        "exact_key": operands.exact_key if operands.is_quantised else None,
        "shift": operands.shift,
        "bridge": inputs.bridge,
        "residual": inputs.residual,
    }
    if "bridge" in form.weight:
        arguments["error_scale"] = call.accumulator.unit_roundoff_of_a_product / 2
    accumulation = call.accumulator.accumulation
    return fused_attention(operands.query, operands.key, inputs.value, accumulation, **arguments | others)


def _with_bridge(call: AttentionCall, inputs: _Inputs) -> _Inputs:
    """With the norms that `bridge_error` is made of."""
    query, key = inputs.operands.query, inputs.operands.key
    parts = query.shape[-1] / 3, call.scaling * call.scaling / 6
    return replace(inputs, bridge=BridgeNorms(query.square().sum(-1), key.square().sum(-1), *parts))


def _with_residual(call: AttentionCall, ahead: Ahead, inputs: _Inputs) -> _Inputs | None:
    """With the way to the residual stream; None where the kernel can't serve.

    A scale that reads the heads' outputs costs a low pass of its own: it joins all heads of a row, which the kernel
    takes one after the other.
    """
    value, queries = inputs.value, inputs.operands.query.shape[2]
    outputs = value.new_zeros(()).expand(len(value), queries, ahead.factor.shape[0], value.shape[-1])
    if ahead.reads_outputs:
        low = _run(call, _NOTHING, inputs, call.seen.mask, blocks=False)
        if low is None:
            return None
        outputs = low[0]
    mapped, squares = zip(*(ahead.mapped(own) for own in value), strict=True)
    scale = [ahead.scale_of(own.transpose(0, 1), i, range(queries)) for i, own in enumerate(outputs)]
    path = ResidualPath(ahead.factor, torch.stack(mapped), torch.stack(squares), torch.stack(scale))
    return replace(inputs, residual=path)


def _drawn(call: AttentionCall, form: ThresholdForm, inputs: _Inputs) -> _Returned | None:
    """As many entries of every row as the form selects, but drawn, tile by tile as `tiled_attention` draws them."""
    generator = call.generator
    assert generator is not None
    start = generator.get_state()
    samples = []
    for sample in range(len(inputs.value)):
        generator.set_state(start)
        tiles = []
        for own, draws, mask in _tiles(call, inputs, sample, generator):
            returned = _run(call, form, own, mask, causal=False, draws=draws)
            if returned is None:
                generator.set_state(start)
                return None
            tiles.append(returned)
        samples.append(_joined(tiles, (1, 2, 1, 2), inputs.operands.key.shape[2]))
    return _joined(samples, (0, 0, 0, 0), inputs.operands.key.shape[2])


def _tiles(
    call: AttentionCall, inputs: _Inputs, sample: int, generator: torch.Generator
) -> Iterator[tuple[_Inputs, Tensor, Tensor | None]]:
    """Tiles of the rows of a sample: inputs, draws (heads, rows, keys) and mask of each.

    Without a mask a tile has the keys that it sees. With one it has all of them, since a row that sees none takes the
    mean of all values; the draws of keys outside the tile's window are never read.
    """
    _, heads, queries, _ = inputs.operands.query.shape
    keys = inputs.operands.key.shape[2]
    for first in range(0, queries, TILE_ROWS):
        rows = range(first, min(first + TILE_ROWS, queries))
        seen = window(call.seen, sample, rows, keys, inputs.value.device)
        draws = torch.rand((heads, len(rows), seen.last - seen.first), generator=generator)
        mask, at = seen.visible, slice(rows.start, rows.stop)
        if call.seen.mask is not None:
            own = call.seen.mask[sample if call.seen.mask.shape[0] > 1 else 0]
            mask = own[:, at]
            draws = torch.nn.functional.pad(draws, (seen.first, keys - seen.last))
        shown = slice(0, draws.shape[-1])
        yield inputs.part(sample, at, shown), draws, None if mask is None else mask[None]


def _joined(parts: list[_Returned], dimensions: tuple[int, int, int, int], keys: int) -> _Returned:
    """What the kernel returned of several parts, along these dimensions."""
    output, selected, visible, marks = zip(*parts, strict=True)
    blocks = -(-keys // BLOCK_KEYS)
    joined = None
    if marks[0] is not None:
        whole = [torch.nn.functional.pad(m, (0, blocks - m.shape[-1])) for m in marks if m is not None]
        joined = torch.cat(whole, dimensions[3])
    tensors = [torch.cat(t, d) for t, d in zip((output, selected, visible), dimensions, strict=False)]
    return tensors[0], tensors[1], tensors[2], joined
