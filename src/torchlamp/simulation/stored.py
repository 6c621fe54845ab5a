"""Stored operands: a low-bit copy of one side of a product beside its full-precision numbers, as kernels read it.

The other side (activations, queries) enters as 16-bit integers with a float32 scale for each group of 32, products are
exact within a group and float32 across groups (docs/decoding.md). The copies of `int4`, `int8` and `int12` are those
that the decoding kernels read, bit for bit; every other operand has the same products, summed in float32.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.low_operands import LowOperand, right_operand
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.quantise import quantise
from torchlamp.kernels.constants import GROUP
from torchlamp.kernels.low_bit_matrix import LowBitMatrix
from torchlamp.kernels.products import products
from torchlamp.kernels.reference_lowbit import quantise_vector
from torchlamp.kernels.specification import Accumulation, Grid

#: Sums in float32, one FMA after the other.
FLOAT32 = Accumulation(Grid())
#: Above 1 by more than the norms' own rounding.
_ABOVE = 1 + 1e-6


class StoredMatrix(Protocol):
    """A stored copy of a matrix (rows, columns); `torchlamp.kernels.low_bit_matrix.LowBitMatrix` is one."""

    @property
    def errors(self) -> Tensor:
        """float32 (rows,): at least the 2-norm of each row minus its copy, to 1e-6; not finite where the row isn't."""

    def products(self, x: Tensor) -> Tensor:
        """The copy times vectors float32 (vectors, columns), which become 16-bit integers: float32 (vectors, rows)."""

    def dequantised(self) -> Tensor:
        """The numbers that the copy stands for: float32 (rows, columns)."""


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A stored copy in any operand, on any device, kept as the float32 numbers that it stands for."""

    values: Tensor
    errors: Tensor
    #: The copy as it enters sums, (1, rows, columns); None: as its values.
    low: LowOperand | None = None

    @classmethod
    def store(
        cls, weight: Tensor, operand: Operand, accumulator: Accumulator | None = None
    ) -> "QuantisedMatrix":
        """The copy of a float32 matrix (rows, columns), on the right of products that an accumulator sums."""
        if accumulator is None or accumulator.register is None:
            values = stored_values(weight, operand.right)
            return cls(values, residual_norms(weight, values))
        low = right_operand(weight[None], operand, accumulator)
        return cls(low.values[0], residual_norms(weight, low.values[0]), low)

    @property
    def entering(self) -> LowOperand:
        """The copy as it enters sums, (1, rows, columns)."""
        return LowOperand(self.values[None], self.values[None]) if self.low is None else self.low

    def products(self, x: Tensor) -> Tensor:
        """The copy times vectors float32 (vectors, columns), which become 16-bit integers: float32 (vectors, rows)."""
        return products(rounded_vectors(x)[None], self.values.T[None], FLOAT32)[0][0]

    def dequantised(self) -> Tensor:
        """The numbers that the copy stands for: float32 (rows, columns)."""
        return self.values


@torch.no_grad()
def store_matrix(weight: Tensor, operand: Operand) -> StoredMatrix:
    """The stored copy of a matrix.

    Parameters
    ----------
    weight : Tensor
        float32 (rows, columns); sums run along the columns.
    operand : Operand
        How its numbers are stored.
    """
    bits = operand.kernel_bits
    if bits is not None and weight.device.type == "cpu":
        return LowBitMatrix.pack(weight.detach(), bits)
    return QuantisedMatrix.store(weight.detach(), operand)


def stored_values(x: Tensor, operand: Operand) -> Tensor:
    """The numbers that stored ones stand for: float32, the shape of `x`; sums run along the last dimension."""
    return quantise(x, operand)


def rounded_vectors(x: Tensor) -> Tensor:
    """Vectors float32 (..., size) as products with a stored operand see them: 16-bit integers times their scale.

    The product of integer and scale is rounded to float32, a relative error of at most 2^-24.
    """
    codes, scales = quantise_vector(x.reshape(-1, x.shape[-1]))
    groups = codes.view(*scales.shape, GROUP).float() * scales[..., None]
    rounded: Tensor = groups.flatten(1)[:, : x.shape[-1]].reshape(x.shape)
    return rounded


def residual_norms(x: Tensor, copy: Tensor) -> Tensor:
    """At least the 2-norms of x - copy along the last dimension, float32; NaN where `x` isn't finite."""
    left = torch.where(copy.isfinite(), x.double() - copy.double(), torch.nan)
    norms = left.norm(dim=-1) * _ABOVE
    nearest = norms.float()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    bound: Tensor = torch.where(nearest.double() < norms, above, nearest)
    return bound


def expected_errors(x: Tensor, errors: Tensor) -> Tensor:
    """Standard deviation of the products of vectors with rows whose residuals point anywhere.

    The residual of a row, of norm e and of random direction in n dimensions, has a product with x of the standard
    deviation e |x| / sqrt(n).

    Parameters
    ----------
    x : Tensor
        float32 (vectors, columns).
    errors : Tensor
        float32 (rows,), the residuals' norms.

    Returns
    -------
    float32 (vectors, rows).
    """
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    deviations: Tensor = errors * (lengths / x.shape[-1] ** 0.5)
    return deviations
