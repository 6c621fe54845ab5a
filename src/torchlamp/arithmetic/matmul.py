"""Matrix products whose accumulator is rounded, with the shapes of `torch.matmul`."""

import numpy as np
import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.formats import Format
from torchlamp.arithmetic.rounding import check_no_gradient, check_tensor
from torchlamp.kernels.products import products


def matmul(a: Tensor, b: Tensor, accumulate: str | Format | Accumulator = "ps4") -> Tensor:
    """The product of two tensors, accumulated in the order k = 0, 1, 2, ... in the given accumulator.

    Parameters
    ----------
    a, b
        float32, with shapes that `torch.matmul` accepts: vectors, matrices, and batches of matrices that
        broadcast. The operands themselves aren't rounded; round them first with `round_to` if they should be.
    accumulate
        An accumulator or its spelling, see `Accumulator`.

    Returns
    -------
    float32 with the shape `torch.matmul` gives. The bits don't depend on threads, batch or device. No
    gradient.

    Raises
    ------
    TypeError
        When an operand isn't a float32 tensor.
    ValueError
        When the shapes don't fit, the accumulator is unknown, or a gradient would be needed.
    """
    accumulator = Accumulator.parse(accumulate)
    check_tensor("matmul", a, b)
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise TypeError(f"matmul takes float32 tensors, got {a.dtype} and {b.dtype}: convert with .float()")
    check_no_gradient("matmul", a, b)
    a, b = a.detach(), b.detach()
    left = a.unsqueeze(0) if a.dim() == 1 else a
    right = b.unsqueeze(1) if b.dim() == 1 else b
    if left.dim() == 0 or right.dim() == 0 or left.shape[-1] != right.shape[-2]:
        raise _shapes_error(a, b)
    try:
        batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    except ValueError:
        raise _shapes_error(a, b) from None

    product = _batched(left, right, batch, accumulator)
    if b.dim() == 1:
        product = product.squeeze(-1)
    if a.dim() == 1:
        product = product.squeeze(-1 if b.dim() == 1 else -2)
    return product


def _batched(a: Tensor, b: Tensor, batch: tuple[int, ...], accumulator: Accumulator) -> Tensor:
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
    out, _ = products(a.reshape(-1, *a.shape[-2:]), shared, accumulator.accumulation)
    out = out.reshape(*(batch[d] for d in order), rows, columns)
    inverse = sorted(range(len(batch)), key=lambda d: order[d])
    return out.permute(*inverse, -2, -1).contiguous()


def _shapes_error(a: Tensor, b: Tensor) -> ValueError:
    return ValueError(
        f"can't multiply shapes {tuple(a.shape)} and {tuple(b.shape)}: the last dimension of the first must "
        "equal the second's last but one (its only one for a vector), and the batch dimensions must broadcast"
    )
