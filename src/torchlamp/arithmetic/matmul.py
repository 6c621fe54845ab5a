"""Matrix products in low precision, with the shapes of `torch.matmul`: transforms, operands, and the accumulator."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.formats import Format
from torchlamp.arithmetic.integers import whole_codes
from torchlamp.arithmetic.low_operands import (
    LowOperand,
    left_operand,
    low_products,
    right_operand,
    warn_of_overflow,
)
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.rounding import check_no_gradient, check_tensor
from torchlamp.arithmetic.transforms import Transform, in_order
from torchlamp.arithmetic.transforms.chain import transformed
from torchlamp.arithmetic.units import held

Operands = str | Operand | tuple[str | Operand, str | Operand]


def matmul(
    a: Tensor,
    b: Tensor,
    accumulator: str | Format | Accumulator = "ps4",
    *,
    operands: Operands | None = None,
    transforms: str | Transform | Sequence[str | Transform] = (),
    accumulate: str | Format | Accumulator | None = None,
) -> Tensor:
    """The product of two tensors, accumulated in the order k = 0, 1, 2, ... in the given accumulator.

        >>> ones = torch.ones(20)
        >>> torchlamp.matmul(ones, ones, "ps2")  # in 2 mantissa bits 8 + 1 rounds to 8
        tensor(8.)
        >>> torchlamp.matmul(a, b, "ps4", operands=("int8/32", "int8/32"), transforms=("center", "sort"))

    First the transforms change both operands, then these are rounded to what their stored numbers stand for, then the
    sums are formed.

    Parameters
    ----------
    a, b : Tensor
        float32, with shapes that `torch.matmul` accepts: vectors, matrices, and batches of matrices that broadcast.
    accumulator : str, Format or Accumulator
        A spelling such as ``"ps7/block32"``, see `Accumulator`.
    operands : str, Operand or a pair, optional
        How both operands are stored, or the left and the right one, see `Operand`; groups and rows run along the sum.
        `tender4/8` is the left one's; the right one is `int4/row`, and the bias' products with it are formed in full.
        None leaves them as they are; `int32` then takes tensors of whole numbers, and a unit by name takes a tensor as
        stored in the first of its formats that holds all its numbers, and as float32 numbers if none does.
    transforms : str, Transform or a sequence of them
        Exact changes, applied in the order of `TRANSFORMS` (docs/transforms.md). Each matrix of `b` is changed by
        itself, with all rows of `a` that it is multiplied by. ``"center"`` takes the mean of the columns of `b` off,
        and adds its products with `a`, formed in float32, to the result.
    accumulate : str, Format or Accumulator, optional
        The first edition's name of `accumulator`.

    Returns
    -------
    float32 with the shape `torch.matmul` gives. Without transforms, the bits don't depend on threads, batch or device
    (those of ``nvfp4`` and ``/tensor`` operands depend on all of the tensor, which shares a scale). No gradient.

    Raises
    ------
    TypeError
        When `a` or `b` isn't a float32 tensor, or a name has another type.
    ValueError
        When the shapes don't fit, a name is unknown, a transform doesn't fit the length of the sum, the accumulator is
        named twice, or a gradient would be needed.
    """
    chosen = _accumulator(accumulator, accumulate)
    stored = _operands(operands)
    changes = in_order([transforms] if isinstance(transforms, str | Transform) else transforms)
    check_tensor("matmul", a, b)
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise TypeError(f"matmul takes float32 tensors, got {a.dtype} and {b.dtype}: convert with .float()")
    check_no_gradient("matmul", a, b)
    a, b = a.detach(), b.detach()
    if operands is not None:
        chosen = chosen.taking(*stored)
    elif chosen.register is None:
        chosen = chosen.taking(held(chosen.name, a), held(chosen.name, b))
    left = a.unsqueeze(0) if a.dim() == 1 else a
    right = b.unsqueeze(1) if b.dim() == 1 else b
    if left.dim() == 0 or right.dim() == 0 or left.shape[-1] != right.shape[-2]:
        raise _shapes_error(a, b)
    try:
        batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    except ValueError:
        raise _shapes_error(a, b) from None

    product = _batched(left, right, batch, _LowPrecision(chosen, stored, changes))
    if b.dim() == 1:
        product = product.squeeze(-1)
    if a.dim() == 1:
        product = product.squeeze(-1 if b.dim() == 1 else -2)
    return product


@dataclass(frozen=True)
class _LowPrecision:
    """How products of (G, M, K) with (Gb, K, N) are formed, batch g with b[g // (G // Gb)]."""

    accumulator: Accumulator
    operands: tuple[Operand, Operand]
    transforms: list[Transform]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """float32 (G, M, N)."""
        changed = transformed(a, b, self.transforms, promote=self.accumulator.promote)
        left, right = self._operand(changed.left, 0), self._operand(changed.right.mT, 1)
        low = low_products(left, right, self.accumulator)
        warn_of_overflow(low, str(self.accumulator))
        out, of_bias = low.sums, left.bias_products(changed.right)
        if of_bias is not None:
            out = out + of_bias
        for shift in (changed.row_shift, changed.column_shift):
            out = out if shift is None else out + shift
        return out

    def _operand(self, x: Tensor, side: int) -> LowOperand:
        operand = self.operands[side]
        if self.accumulator.register is not None and operand.is_float32:
            return LowOperand(x, x, whole_codes(x, str(self.accumulator)))
        return (right_operand if side else left_operand)(x, operand, self.accumulator)


def _accumulator(
    accumulator: str | Format | Accumulator, accumulate: str | Format | Accumulator | None
) -> Accumulator:
    """The one that is named."""
    if accumulate is None:
        return Accumulator.parse(accumulator).outside_attention()
    if accumulator != "ps4":
        raise ValueError(
            f"matmul got accumulator={str(accumulator)!r} and accumulate={str(accumulate)!r}, two names of one "
            "thing: leave out accumulate"
        )
    return Accumulator.parse(accumulate).outside_attention()


def _operands(operands: Operands | None) -> tuple[Operand, Operand]:
    """The left and the right one."""
    if operands is None:
        return Operand(), Operand()
    if isinstance(operands, str | Operand):
        return Operand.parse(operands), Operand.parse(operands)
    if not isinstance(operands, tuple | list):
        raise TypeError(
            f"operands is a name like 'int8/32' or a pair of them, got {type(operands).__name__} {operands!r}"
        )
    if len(operands) != 2:
        raise ValueError(
            f"operands={operands!r} has {len(operands)} names: give one for both, or a left and a right one"
        )
    return Operand.parse(operands[0]), Operand.parse(operands[1])


def _batched(a: Tensor, b: Tensor, batch: tuple[int, ...], multiply: _LowPrecision) -> Tensor:
    """Two operands of at least two dimensions, the batch dimensions being known to broadcast to `batch`."""
    rows, depth, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    if 0 in (*batch, rows, depth, columns):
        return a.new_zeros((*batch, rows, columns))
    # The kernel shares one b among consecutive groups. So the batch dimensions along which b repeats go last,
    # and b is neither expanded nor copied for them.
    padded = (1,) * (len(batch) - (b.dim() - 2)) + tuple(b.shape[:-2])
    order = sorted(range(len(batch)), key=lambda d: padded[d] == 1)
    shared = b.reshape(-1, *b.shape[-2:])
    a = a.expand(*batch, *a.shape[-2:]).permute(*order, -2, -1)
    out = multiply(a.reshape(-1, *a.shape[-2:]), shared).reshape(*(batch[d] for d in order), rows, columns)
    inverse = sorted(range(len(batch)), key=lambda d: order[d])
    return out.permute(*inverse, -2, -1).contiguous()


def _shapes_error(a: Tensor, b: Tensor) -> ValueError:
    return ValueError(
        f"can't multiply shapes {tuple(a.shape)} and {tuple(b.shape)}: the last dimension of the first must "
        "equal the second's last but one (its only one for a vector), and the batch dimensions must broadcast"
    )
