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
    aligned = None
    if fuse.group > 1:
        aligned = scale_exponents(left, *fuse.scales[0]) + scale_exponents(right, *fuse.scales[1])
    shape = (*left.shape[:-2], right.shape[-1])
    accumulator = torch.zeros(shape, dtype=torch.float32, device=left.device)
    steps = []
    for first in range(start, stop, fuse.length):
        group = slice(first, min(first + fuse.length, stop))
        terms = left[..., group, :], right[..., group, :]
        if aligned is None:
            accumulator = unit_step(*terms, accumulator, grid, fuse)
        else:
            accumulator = grouped_step(*terms, aligned[..., group, :], accumulator, grid, fuse)
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


def grouped_step(
    left: Tensor, right: Tensor, exponents: Tensor, accumulator: Tensor, grid: Grid, fuse: Fuse
) -> Tensor:
    """`unit_step` of a unit with groups; `exponents` (..., L, columns) are those of each product's two scales."""
    running, zero = accumulator.double(), fuse.zero_exponent(grid)
    sums, largest = [], _exponent(running, grid.min_exponent, zero)
    for first in range(0, left.shape[-2], fuse.group):
        total, seen = torch.zeros_like(running), torch.zeros_like(running, dtype=torch.bool)
        for k in range(first, min(first + fuse.group, left.shape[-2])):
            product = left[..., k, :] * right[..., k, :]
            total, seen = total + product, seen | (product != 0)
        sums.append(total)
        own = exponents[..., first, :].masked_fill(~seen, zero)
        largest = torch.maximum(largest, own)
    unit = torch.exp2(fuse.bits - largest)
    whole = torch.trunc(running * unit)
    for total in sums:
        whole = whole + torch.trunc(total * unit)
    rounded = _rounded(whole / unit, grid, fuse.nearest)
    nan = torch.tensor(_NAN_BITS, dtype=torch.int32, device=rounded.device).view(torch.float32)
    return torch.where(rounded.isnan(), nan, rounded)


def scale_exponents(x: Tensor, length: int, peak: float) -> Tensor:
    """Exponents of the scales of float64 numbers (..., K, n), `length` of which share one along K; float64 (..., K, n).

    The scale has the exponent of the largest magnitude divided by `peak`; 0 for numbers without a scale.
    """
    if length == 0:
        return torch.zeros_like(x)
    depth = x.shape[-2]
    length = min(length, depth) if length > 0 else depth
    padded = torch.nn.functional.pad(x.abs(), (0, 0, 0, -depth % length))
    blocks = padded.reshape(*x.shape[:-2], -1, length, x.shape[-1])
    largest = blocks.amax(dim=-2) / peak
    return _exponent(largest, -1000, 0).repeat_interleave(length, dim=-2)[..., :depth, :]


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
