"""Exact pieces of narrow arithmetic in Triton: rounding to a grid, and the fused multiply-add.

A grid reaches a kernel as the tuple of numbers `grid_numbers`. The readable forms are `torchlamp.kernels.rounding` and
`torchlamp.kernels.fma`.
"""

import triton
import triton.language as tl

from torchlamp.kernels.constants import OVERFLOWS
from torchlamp.kernels.specification import Grid

GridNumbers = tuple[int, int, int, float, int, bool, bool, bool]

INFINITY: tl.constexpr = tl.constexpr(float("inf"))
_TO_INF: tl.constexpr = tl.constexpr(OVERFLOWS.index("inf"))
_SATURATES: tl.constexpr = tl.constexpr(OVERFLOWS.index("saturate"))


def grid_numbers(grid: Grid) -> GridNumbers:
    """A grid as kernels are told it."""
    return (
        grid.mantissa_bits,
        grid.min_exponent,
        grid.max_exponent,
        grid.max_value,
        OVERFLOWS.index(grid.overflow),
        grid.subnormals,
        grid.signed,
        grid.negative_zero,
    )


@triton.jit
def fma(a, b, c, INTERPRETED: tl.constexpr):
    """The float32 number a * b + c with one rounding. Triton's interpreter has two, so it is built from float64."""
    if INTERPRETED:
        product = a.to(tl.float64) * b.to(tl.float64)
        addend = c.to(tl.float64)
        total = product + addend
        added = total - product
        error = ((product - (total - added)) + (addend - added)) * total
        inward = error < 0
        odd = (total.to(tl.int64, bitcast=True) - inward.to(tl.int64)) | (inward | (error > 0)).to(tl.int64)
        return odd.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _drop(integer, shift):
    """Integer / 2^shift to the nearest integer, ties to even; shift >= 1."""
    return (integer + ((integer >> shift) & 1) + ((1 << (shift - 1)) - 1)) >> shift


@triton.jit
def round_to(x, GRID: tl.constexpr):
    """float32 numbers rounded to the grid, to nearest, ties to even; NaN stays as it is."""
    MANTISSA: tl.constexpr = GRID[0]
    MIN_EXPONENT: tl.constexpr = GRID[1]
    NARROW_RANGE: tl.constexpr = (
        MIN_EXPONENT != -126
        or GRID[2] != 127
        or GRID[4] != _TO_INF
        or not GRID[5]
        or not GRID[6]
        or not GRID[7]
    )
    SHIFT: tl.constexpr = 23 - MANTISSA
    if not NARROW_RANGE:
        if SHIFT == 0:
            return x
        else:
            bits = x.to(tl.int32, bitcast=True)
            kept = (bits + ((bits >> SHIFT) & 1) + ((1 << (SHIFT - 1)) - 1)) & -(1 << SHIFT)
            return tl.where(x != x, x, kept.to(tl.float32, bitcast=True))
    else:
        return _round_range(x, GRID)


@triton.jit
def _round_range(x, GRID: tl.constexpr):
    """`round_to` for a grid that has not float32's range."""
    MANTISSA: tl.constexpr = GRID[0]
    MIN_EXPONENT: tl.constexpr = GRID[1]
    SHIFT: tl.constexpr = 23 - MANTISSA
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    result = magnitude
    if SHIFT > 0:
        result = _drop(magnitude, SHIFT) << SHIFT
    rounded = result.to(tl.float32, bitcast=True)
    if MIN_EXPONENT > -126:
        # Multiples of the constant spacing below the smallest normal number; a shift of 26 leaves nothing.
        exponent = magnitude >> 23
        significand = magnitude & 0x7FFFFF
        significand = tl.where(exponent > 0, significand | 0x800000, significand)
        cut = MIN_EXPONENT - MANTISSA + 150 - tl.maximum(exponent, 1)
        cut = tl.minimum(tl.maximum(cut, 1), 26)
        SPACING: tl.constexpr = 2.0 ** (MIN_EXPONENT - MANTISSA)
        small = _drop(significand, cut).to(tl.float32) * SPACING
        rounded = tl.where(magnitude < ((MIN_EXPONENT + 127) << 23), small, rounded)
    largest = tl.full(rounded.shape, GRID[3], tl.float32)
    if GRID[4] == _SATURATES:
        rounded = tl.where(rounded > largest, largest, rounded)
    elif GRID[4] == _TO_INF:
        rounded = tl.where(rounded > largest, INFINITY, rounded)
    else:
        rounded = tl.where(rounded > largest, float("nan"), rounded)
    if not GRID[5]:
        SMALLEST: tl.constexpr = 2.0**MIN_EXPONENT
        rounded = tl.where(rounded < SMALLEST, 0.0, rounded)
    negative = x.to(tl.int32, bitcast=True) < 0
    if GRID[6]:
        # Its bit, not a minus: before Triton 3.9 that is 0 - x, and 0 - 0 has no sign.
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        rounded = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        rounded = tl.where(negative, 0.0, rounded)
    if not GRID[7]:
        rounded = tl.where(rounded == 0, 0.0, rounded)
    return tl.where(x != x, x, rounded)
