"""Convolutions under a policy: every sum over a window of the input is one of a linear map of patches.

A convolution with g groups is g linear maps, from the windows of a group's input channels to the group's output
channels. The low pass and the recomputation are those of linear layers on patches; the look-ahead sees each sample's
outputs (channels x positions) as one row, as the function that follows does.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.policy.policy import SitePolicy
from torchlamp.simulation.linear import Arrangement, LinearResult, LookAhead, look_ahead
from torchlamp.simulation.linear_sums import Side, Sums, Weights, side_of, with_chunks
from torchlamp.simulation.stored import QuantisedMatrix

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Numbers of patches that are there at a time.
_CHUNK = 2**24


def is_convolution(g: Any) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether g is one of torch's convolutions."""
    return type(g) in _KINDS


class Convolution:
    """A `torch.nn.Conv1d`, `Conv2d` or `Conv3d` as linear maps of patches.

    Raises
    ------
    ValueError
        Padding other than zeros.
    """

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        if module.padding_mode != "zeros":
            raise ValueError(
                f"g pads with padding_mode={module.padding_mode!r}: compose takes 'zeros'; pad the input yourself"
            )
        self.module = module
        self.dimensions = len(module.kernel_size)
        self.kernel, self.stride = tuple(module.kernel_size), tuple(module.stride)
        self.dilation, self.groups = tuple(module.dilation), module.groups
        weight, bias = module.weight.detach(), module.bias
        per_group = weight.flatten(1).chunk(self.groups)
        biases: Sequence[Tensor | None] = (
            [None] * self.groups if bias is None else bias.detach().chunk(self.groups)
        )
        #: One map for each group, (channels of the group * window, output channels of the group).
        self.maps = [Weights(w.T, b) for w, b in zip(per_group, biases, strict=True)]

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """(channels, ...) of the outputs of a sample. ValueError for an input that doesn't fit."""
        if x.ndim != self.dimensions + 2 or x.shape[1] != self.module.in_channels:
            wanted = ", ".join(["samples", str(self.module.in_channels), *["size"] * self.dimensions])
            raise ValueError(
                f"input of shape {tuple(x.shape)} doesn't fit {self.module}: it must be ({wanted})"
            )
        sizes = [size + sum(pad) for size, pad in zip(x.shape[2:], self._padding(), strict=True)]
        spatial = [
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(sizes, self.kernel, self.stride, self.dilation, strict=True)
        ]
        if min(spatial) < 1:
            raise ValueError(
                f"input of shape {tuple(x.shape)} is smaller than the window {self.kernel} of {self.module}"
            )
        return self.module.out_channels, *spatial

    def patches(self, x: Tensor) -> list[Tensor]:
        """The windows of each group of input channels, float32 (samples * positions, channels * window) each."""
        pads = [pad for pair in reversed(self._padding()) for pad in pair]
        windows = functional.pad(x, pads)
        for dimension, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            span = d * (k - 1) + 1
            windows = windows.unfold(2 + dimension, span, s)[..., ::d]
        # (samples, channels, *positions, *window) -> (samples, *positions, channels, *window)
        n = self.dimensions
        order = [0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)]
        moved = windows.permute(order)
        parts = moved.chunk(self.groups, dim=1 + n)
        return [part.reshape(-1, self.maps[0].matrix.shape[0]) for part in parts]

    def _padding(self) -> list[tuple[int, int]]:
        given = self.module.padding
        if given == "valid":
            return [(0, 0)] * self.dimensions
        if given == "same":
            totals = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        assert isinstance(given, tuple)
        return [(pad, pad) for pad in given]


class _ByPosition(Arrangement):
    """Sums (samples * positions, channels of a group) as rows (samples, channels * positions)."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        by_channel = [part.view(self.samples, -1, part.shape[1]).transpose(1, 2) for part in parts]
        return torch.cat(by_channel, dim=1).flatten(1)

    def split(self, joined: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        channels = [part.shape[1] for part in parts]
        by_channel = torch.split(joined.reshape(self.samples, sum(channels), -1), channels, dim=1)
        return [part.transpose(1, 2).flatten(0, 1) for part in by_channel]


def _with_copy(side: Side, operand: Operand, accumulator: Accumulator) -> Side:
    matrix = side.weights.matrix.detach().T
    return replace(side, copy=QuantisedMatrix.store(matrix, operand, accumulator))


@torch.no_grad()
def convolved(
    x: Tensor,
    convolution: Convolution,
    policy: SitePolicy,
    next_function: LookAhead,
    generator: torch.Generator | None = None,
) -> LinearResult:
    """A convolution under a policy: outputs float32 (samples, channels * positions), one row a sample.

    Transforms are fitted to each sample's patches; random rules draw once for all samples.

    Raises
    ------
    ValueError
        A stored operand, or a random rule without a generator.
    TypeError
        Anything but float32.
    """
    precision, rule = policy.precision, policy.rule
    if precision.is_stored:
        raise ValueError(
            f"stored operand '{precision.operand}': convolutions run operands with an accumulator, for example "
            f"'{precision.operand}@fp32'"
        )
    if x.dtype != torch.float32 or convolution.module.weight.dtype != torch.float32:
        raise TypeError(
            f"compose takes float32, got input {x.dtype} and weight {convolution.module.weight.dtype}: convert with "
            ".float()"
        )
    if rule.needs_generator and generator is None:
        raise ValueError(f"rule {str(rule)!r} draws random numbers: pass a generator")
    shape = convolution.output_shape(x)
    outputs = x.new_empty(len(x), torch.Size(shape).numel())
    selected = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    numbers = outputs.shape[1] // shape[0] * convolution.maps[0].matrix.shape[0] * convolution.groups
    alone = rule.needs_generator or bool(precision.transforms) or precision.operand.is_tender
    together = 1 if alone else max(1, _CHUNK // max(1, numbers))
    start, overflowed = None if generator is None else generator.get_state(), 0
    for first in range(0, len(x), together):
        rows = slice(first, min(first + together, len(x)))
        if generator is not None and start is not None:
            generator.set_state(start)
        sides = [
            side_of(patches, weights, precision.operand, precision.transforms, None, precision.sums)
            for patches, weights in zip(convolution.patches(x[rows].detach()), convolution.maps, strict=True)
        ]
        if not precision.operand.is_float32:
            sides = [
                side if side.copy is not None else _with_copy(side, precision.operand, precision.sums)
                for side in sides
            ]
        if precision.operand.is_tender:
            sides = with_chunks(sides, precision.operand, precision.sums)
        pieces = [Sums(side, slice(None), precision.sums, rule, precision.operand) for side in sides]
        overflowed += sum(piece.overflowed for piece in pieces)
        arrangement = _ByPosition(rows.stop - rows.start)
        selected[rows] = look_ahead(pieces, rows, rule, next_function, generator, 0, arrangement)
        outputs[rows] = arrangement.join([piece.y for piece in pieces])
    return LinearResult((outputs,), outputs.shape[1], selected, overflowed)
