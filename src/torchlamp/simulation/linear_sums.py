"""The sums of a linear map in low precision: the map, its input as it enters them, and their expected errors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.low_operands import LowOperand, left_operand, low_products
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.tender import Ranges
from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.chain import change_operands, fit, moments_of
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.kernels.products import products
from torchlamp.kernels.recompute import recompute
from torchlamp.kernels.rounding import round_to_grid
from torchlamp.kernels.specification import Accumulation, Grid
from torchlamp.rules.rule import Rule
from torchlamp.simulation.stored import QuantisedMatrix, expected_errors

#: Share of recomputed entries from which a full float32 pass is faster than one inner product after the other.
_DENSE = 0.05
_FLOAT32 = Accumulation(Grid())


@dataclass(frozen=True)
class Weights:
    """A linear map y = x `matrix` + `bias`."""

    #: float32 (inputs, outputs), any strides: the transpose of a `torch.nn.Linear`'s weight.
    matrix: Tensor
    #: float32 (outputs,) or None.
    bias: Tensor | None = None
    #: Whether the sum with the bias is rounded to the accumulator's format; otherwise it stays float32.
    narrow_bias: bool = True

    @cached_property
    def norms(self) -> Tensor:
        """||w_j||_2 of every output, float32 (outputs,)."""
        norms: Tensor = torch.linalg.vector_norm(self.matrix.detach(), dim=0)
        return norms


@dataclass(frozen=True, eq=False)
class Side:
    """One map and its input, both transformed; the copy of the weights if they are quantised."""

    #: float32 (rows, inputs).
    x: Tensor
    weights: Weights
    copy: QuantisedMatrix | None = None
    #: The input as it enters the sums, (1, rows, inputs), where that depends on all rows; None: row by row.
    low: LowOperand | None = None

    def entering(self, some: slice, operand: Operand, accumulator: Accumulator) -> LowOperand:
        """Some rows of the input as they enter the sums."""
        if self.low is not None:
            return self.low[some]
        x = self.x[None, some]
        return LowOperand(x, x) if self.copy is None else left_operand(x, operand, accumulator)


def side_of(
    x: Tensor,
    weights: Weights,
    operand: Operand,
    transforms: Sequence[Transform],
    moments: Moments | None,
    accumulator: Accumulator,
) -> Side:
    """A map and the input of one sample, changed by transforms; a new copy of changed weights."""
    if not transforms or 0 in x.shape:
        return Side(x, weights)
    a, b = x[None], weights.matrix.detach()[None]
    left, right = moments_of(a, b, transforms)
    changed = change_operands(
        fit(transforms, left if moments is None else moments, right, "left", accumulator.promote), a, b
    )
    bias, narrow = weights.bias, weights.narrow_bias
    if changed.column_shift is not None:
        added = changed.column_shift[0, 0]
        bias, narrow = added if bias is None else added + bias.detach(), False
    moved = Weights(changed.right[0], bias, narrow)
    copy = None if operand.is_float32 else QuantisedMatrix.store(moved.matrix.T, operand, accumulator)
    return Side(changed.left[0], moved, copy)


def with_chunks(
    sides: Sequence[Side], operand: Operand, accumulator: Accumulator, ranges: Ranges | None = None
) -> list[Side]:
    """The sides of one sample, whose inputs are biased and grouped once; maps of one input share them."""
    made: list[tuple[Tensor, LowOperand]] = []
    for side in sides:
        if not any(x is side.x for x, _ in made):
            made.append((side.x, left_operand(side.x[None], operand, accumulator, ranges)))
    return [replace(side, low=next(low for x, low in made if x is side.x)) for side in sides]


class Sums:
    """The sums of some rows with one map, and what is known about them."""

    def __init__(
        self, side: Side, some: slice, accumulator: Accumulator, rule: Rule, operand: Operand
    ) -> None:
        self.x, self.weights, self._copy = side.x[some], side.weights, side.copy
        self._low = side.entering(some, operand, accumulator)
        self._accumulator = accumulator
        form, bias = accumulator.accumulation, self.weights.bias
        matrix = self.weights.matrix.detach()
        right = LowOperand(matrix.T[None], matrix.T[None]) if side.copy is None else side.copy.entering
        low = low_products(self._low, right, accumulator, squares="squares" in rule.byproducts)
        #: Sums that didn't fit an integer register.
        self.overflowed = 0 if low.overflowed is None else int(low.overflowed.sum())
        self.y, self._squares = low.sums[0], None if low.squares is None else low.squares[0]
        of_bias = self._low.bias_products(matrix[None])
        if of_bias is not None:
            self.y = self.y + of_bias[0]
        if bias is not None:
            self.y = self.y + bias.detach()
        if bias is not None and self.weights.narrow_bias and of_bias is None:
            self.y = round_to_grid(self.y, form.result)
            # The rounding after the bias is one more step; a promoted sum and a unit's take it in float32.
            if self._squares is not None and form.result == form.grid:
                self._squares = self._squares.addcmul_(self.y, self.y)

    @property
    def error(self) -> Tensor:
        """Expected error: (u / 2) sqrt(sum of the squared partial sums), and that of quantised operands."""
        assert self._squares is not None, "the low pass ran without the by-product 'squares'"
        rounding = self._squares.sqrt().mul_(self._accumulator.unit_roundoff / 2)
        if self._copy is None:
            return rounding
        exact, values = self._low.exact[0], self._low.values[0]
        of_weights = expected_errors(exact, self._copy.errors)
        left: Tensor = torch.linalg.vector_norm(exact - values, dim=-1, keepdim=True)
        of_input = self.weights.norms * (left / self.x.shape[-1] ** 0.5)
        squares: Tensor = rounding.square() + of_weights.square() + of_input.square()
        return squares.sqrt_()

    @property
    def bridge_error(self) -> Tensor:
        """Expected rounding error, from the sums and the norms of their operands, see `Bridge`."""
        spread = self.x.norm(dim=-1, keepdim=True).square() * self.weights.norms.square()
        squares: Tensor = self.y.square() * (self.x.shape[-1] / 3) + spread / 6
        return squares.sqrt() * (self._accumulator.unit_roundoff_of_a_product / 2)

    @cached_property
    def exact(self) -> Tensor:
        """The sums in float32, with the bits of a recomputation."""
        sums, _ = products(self.x[None], self.weights.matrix.detach()[None], _FLOAT32)
        return sums[0] if self.weights.bias is None else sums[0] + self.weights.bias.detach()

    @cached_property
    def numerator(self) -> Tensor:
        """|w_j|^T |x| + |b_j|."""
        sums, _ = products(self.x.abs()[None], self.weights.matrix.detach().abs()[None], _FLOAT32)
        return self._with_bias(sums[0])

    @cached_property
    def cheap_numerator(self) -> Tensor:
        """||w_j|| ||x|| + |b_j|."""
        lengths: Tensor = torch.linalg.vector_norm(self.x, dim=-1, keepdim=True)
        bounds: Tensor = lengths * self.weights.norms
        return self._with_bias(bounds)

    def _with_bias(self, sums: Tensor) -> Tensor:
        return sums if self.weights.bias is None else sums + self.weights.bias.detach().abs()

    def recompute(self, mask: Tensor) -> None:
        """Replace the marked entries of y by float32 sums."""
        marked = int(mask.sum())
        if "exact" in self.__dict__ or marked > _DENSE * mask.numel():
            self.y = torch.where(mask, self.exact, self.y)
        elif marked:
            y, matrix = self.y[None].clone(), self.weights.matrix.detach()[None]
            recompute(y, self.x[None], matrix, mask[None])
            bias = self.weights.bias
            self.y = y[0] if bias is None else torch.where(mask, y[0] + bias.detach(), y[0])
