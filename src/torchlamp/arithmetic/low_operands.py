"""Operands as they enter a low pass, and their products: values or integers, less a bias that is added back."""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.integers import codes_of
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.quantise import quantise
from torchlamp.arithmetic.tender import CHUNK, Ranges, Tables
from torchlamp.kernels.integer_products import Codes, integer_products
from torchlamp.kernels.products import products
from torchlamp.kernels.specification import Accumulation, Grid

_FLOAT32 = Accumulation(Grid())


@dataclass(frozen=True, eq=False)
class LowOperand:
    """Vectors of a product as they enter its low pass.

    Attributes
    ----------
    values : Tensor
        float32 (batch, vectors, K): the numbers that the stored ones stand for, less the bias.
    exact : Tensor
        The same in full, less the bias, too.
    codes : Codes or None
        The stored integers, where the accumulator sums integers.
    bias : Tensor or None
        float32 (batch, chunks, K): what was taken off the vectors of each chunk; None: nothing.
    chunks : Tensor or None
        int64 (vectors,): the chunk of each.
    """

    values: Tensor
    exact: Tensor
    codes: Codes | None = None
    bias: Tensor | None = None
    chunks: Tensor | None = None

    def __getitem__(self, vectors: slice) -> "LowOperand":
        """Some of the vectors of every batch."""
        return replace(
            self,
            values=self.values[:, vectors],
            exact=self.exact[:, vectors],
            codes=None if self.codes is None else self.codes[vectors],
            chunks=None if self.chunks is None else self.chunks[vectors],
        )

    def batches(self, some: slice) -> "LowOperand":
        """Some of the batches."""
        return replace(
            self,
            values=self.values[some],
            exact=self.exact[some],
            codes=None if self.codes is None else self.codes.batches(some),
            bias=None if self.bias is None else self.bias[some],
        )

    def stacked(self, batch: int) -> "LowOperand":
        """The vectors of several batches one after the other in `batch` of them, without biases."""
        shape = (batch, -1, self.values.shape[-1])
        codes = None if self.codes is None else self.codes.stacked(batch)
        return LowOperand(self.values.reshape(shape), self.exact.reshape(shape), codes)

    def terms(self, count: int) -> "LowOperand":
        """The first terms of the sum alone."""
        codes = self.codes if self.codes is None else self.codes.terms(count)
        return replace(self, values=self.values[..., :count], exact=self.exact[..., :count], codes=codes)

    def bias_products(self, b: Tensor) -> Tensor | None:
        """What products of these vectors with b (Gb, K, N) lack: those of their bias, float32 (batch, vectors, N).

        Formed in float32, from `b` in full.
        """
        if self.bias is None or self.chunks is None:
            return None
        first = int(self.chunks[0]) if len(self.chunks) else 0
        last = int(self.chunks[-1]) + 1 if len(self.chunks) else 0
        sums, _ = products(self.bias[:, first:last], b, _FLOAT32)
        return sums.index_select(1, self.chunks - first)


@torch.no_grad()
def left_operand(
    x: Tensor,
    operand: Operand,
    accumulator: Accumulator,
    ranges: Ranges | None = None,
    *,
    unsigned: bool = False,
) -> LowOperand:
    """Vectors on the left of a product: activations, queries, probabilities.

    Parameters
    ----------
    x : Tensor
        float32 (batch, vectors, K).
    operand : Operand
        How they are stored.
    accumulator : Accumulator
        What sums them.
    ranges : Ranges, optional
        Calibrated ranges of Tender's channels, (batch, chunks, K); None: those of `x`.
    unsigned : bool
        Whether Tender takes them for numbers without sign, as probabilities are.

    Raises
    ------
    ValueError
        More vectors than the ranges are for.
    """
    if not operand.is_tender or not x.numel():
        return right_operand(x, operand.right, accumulator)
    assert operand.block is not None
    tables = Tables.of(Ranges.of(x) if ranges is None else ranges, operand.block, unsigned=unsigned)
    left, codes = tables.codes(x)
    chunks = torch.arange(x.shape[1], device=x.device) // CHUNK
    stored = codes if accumulator.register is not None else None
    return LowOperand(codes.values, left, stored, None if unsigned else tables.bias, chunks)


@torch.no_grad()
def right_operand(x: Tensor, operand: Operand, accumulator: Accumulator) -> LowOperand:
    """Vectors float32 (batch, vectors, K) on the right of a product, weights or values; or any that aren't Tender's."""
    block = operand.right.block
    if accumulator.register is None or block is None or not isinstance(block.element, int):
        return LowOperand(quantise(x, operand.right), x)
    codes = codes_of(x, operand.right)
    return LowOperand(quantise(x, operand.right), x, codes)


@dataclass(frozen=True, eq=False)
class LowSums:
    """Sums of a low pass.

    Attributes
    ----------
    sums : Tensor
        float32 (G, M, N), without the products of a bias.
    squares : Tensor or None
        The sums of squared partial sums, as `products` has them; zeros of a register, which doesn't round.
    overflowed : Tensor or None
        bool (G, M, N): sums that didn't fit an integer register; None: all did.
    """

    sums: Tensor
    squares: Tensor | None = None
    overflowed: Tensor | None = None


def low_products(
    left: LowOperand,
    right: LowOperand,
    accumulator: Accumulator,
    *,
    scaling: float | None = None,
    causal: int | None = None,
    squares: bool = False,
) -> LowSums:
    """Products of vectors (G, M, K) and (Gb, N, K) in an accumulator; keywords and groups as `products` has them."""
    if accumulator.register is not None:
        assert left.codes is not None
        assert right.codes is not None
        sums, overflowed = integer_products(
            left.codes, right.codes, accumulator.register, scaling=scaling, causal=causal
        )
        return LowSums(sums, torch.zeros_like(sums) if squares else None, overflowed)
    sums, found = products(
        left.values,
        right.values.mT,
        accumulator.accumulation,
        scaling=scaling,
        causal=causal,
        squares=squares,
    )
    return LowSums(sums, found)


def overflow_warning(overflowed: int, sums: int, accumulator: str = "int32") -> str | None:
    """One line that says how many sums didn't fit their register; None: all did."""
    if not overflowed:
        return None
    return (
        f"{overflowed:,} of {sums:,} sums don't fit the register of {accumulator} and wrapped around: take fewer "
        "bits or groups, or another accumulator"
    )


def warn_of_overflow(low: LowSums, accumulator: str) -> None:
    """RuntimeWarning where sums didn't fit."""
    overflowed = 0 if low.overflowed is None else int(low.overflowed.sum())
    message = overflow_warning(overflowed, low.sums.numel(), accumulator)
    if message is not None:
        warnings.warn(message, RuntimeWarning, stacklevel=5)
