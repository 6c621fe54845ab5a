"""The readable reference of a matrix unit's sums: `Fuse` in `torchlamp.kernels.specification` is the definition.

Everything is float64, in which it is exact: products of float32 numbers have 48 bits, aligned terms at most 42, and
the sum of 1024 of them 52.
"""

import torch
from torch import Tensor

from torchlamp.kernels.specification import Fuse, Grid

#: The NaN that units return.
_NAN_BITS = 0x7FFFFFFF


def unit_chain(left: Tensor, right: Tensor, grid: Grid, fuse: Fuse, start: int, stop: int) -> list[Tensor]:
    """The accumulator of a unit after each group of products k = start..stop-1, from zero.

    Parameters
    ----------
    left, right
        float64 (..., rows, K, 1) and (..., 1, K, columns), float32 numbers.
    grid, fuse
        What sums are rounded to, and the unit.
    start, stop
        The range of k.

    Returns
    -------
    float32 (..., rows, columns), ceil((stop - start) / length) of them; a last, shorter group is filled with zeros.
    """
    shape = (*left.shape[:-2], right.shape[-1])
    accumulator = torch.zeros(shape, dtype=torch.float32, device=left.device)
    steps = []
    for first in range(start, stop, fuse.length):
        group = slice(first, min(first + fuse.length, stop))
        accumulator = unit_step(left[..., group, :], right[..., group, :], accumulator, grid, fuse)
        steps.append(accumulator)
    return steps


def unit_step(left: Tensor, right: Tensor, accumulator: Tensor, grid: Grid, fuse: Fuse) -> Tensor:
    """One group of products, float64 (..., L, 1) and (..., L, columns), and a float32 accumulator: its next value."""
    running = accumulator.double()
    # The exponent of every term; what isn't finite is dealt with at the end.
    low = torch.full_like(running, fuse.zero_exponent(grid))
    largest = torch.maximum(_exponent(running, grid.min_exponent, fuse.zero_exponent(grid)), low)
    left_exponents = _exponent(left, fuse.floors[0], None)
    right_exponents = _exponent(right, fuse.floors[1], None)
    for k in range(left.shape[-2]):
        exponent = left_exponents[..., k, :] + right_exponents[..., k, :]
        largest = torch.maximum(largest, exponent)
    unit = torch.exp2(fuse.bits - largest)
    total = torch.trunc(running * unit)
    plain = running
    for k in range(left.shape[-2]):
        product = left[..., k, :] * right[..., k, :]
        total = total + torch.trunc(product * unit)
        plain = plain + product
    rounded = _rounded(total / unit, grid, fuse.nearest)
    special = plain.float().masked_fill(plain.isnan(), 0.0)
    result = torch.where(plain.isfinite(), rounded, special)
    nan = torch.tensor(_NAN_BITS, dtype=torch.int32, device=result.device).view(torch.float32)
    return torch.where(plain.isnan(), nan, result)


def _exponent(x: Tensor, floor: int, zero: int | None) -> Tensor:
    """max(floor(log2 |x|), floor) of float64 numbers, float64; `zero` (None: far below all) for zeros."""
    _, exponent = torch.frexp(x)
    known = (exponent - 1).clamp_min(floor).double()
    return known.masked_fill(~x.isfinite(), float(floor)).masked_fill(
        x == 0, -4096.0 if zero is None else zero
    )


def _rounded(x: Tensor, grid: Grid, nearest: bool) -> Tensor:
    """float64 numbers rounded once to the grid, float32; -0 becomes +0, and what is too large infinite."""
    _, exponent = torch.frexp(x)
    spacing = torch.exp2((exponent - 1).clamp_min(grid.min_exponent).double() - grid.mantissa_bits)
    steps = torch.round(x / spacing) if nearest else torch.trunc(x / spacing)
    value = steps * spacing
    value = torch.where(value.abs() > grid.max_value, torch.copysign(torch.full_like(x, torch.inf), x), value)
    return (value + 0.0).float()
