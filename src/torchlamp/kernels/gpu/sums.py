"""Narrow sums of a tile of rows and columns in Triton; the readable form is `torchlamp.kernels.reference`.

Every form of `Accumulation` but units with groups. An accumulation reaches a kernel as two tuples: the grid
(`rounding.grid_numbers`) and `form_numbers`. Sums are written out product by product: no `tl.dot`, which would add in
an order and a precision of its own.
"""

import triton
import triton.language as tl

from torchlamp.kernels.gpu.rounding import INFINITY, fma, round_to
from torchlamp.kernels.specification import Accumulation

FormNumbers = tuple[bool, int, int, int, int, bool, int, int, int]

#: The grid of float32 as `rounding.grid_numbers` gives it, for sums that nothing rounds; and their form.
FLOAT32_GRID = (23, -126, 127, 3.4028234663852886e38, 0, True, True, True)
FLOAT32_FORM = (True, 1, 0, 0, 0, False, 0, 0, 0)
_FLOAT32: tl.constexpr = tl.constexpr(FLOAT32_GRID)
_NAN_BITS: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_FAR_BELOW: tl.constexpr = tl.constexpr(-4096)


def form_numbers(accumulation: Accumulation) -> FormNumbers:
    """How sums are formed, as kernels are told it: fused, block, promote, and a unit's numbers (length 0: none)."""
    fuse = accumulation.fuse
    unit = (0, 0, False, 0, 0, 0)
    if fuse is not None:
        unit = (fuse.length, fuse.bits, fuse.nearest, *fuse.floors, fuse.zero_exponent(accumulation.grid))
    return (accumulation.fused, accumulation.block, accumulation.promote, *unit)


@triton.jit
def tile_sums(
    a, a_k, rows, b, b_k, columns, depth,
    GRID: tl.constexpr, FORM: tl.constexpr, SQUARES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Sums over k of a[:, None] b[None, :], and sums of squares of the accumulator (zeros if not asked for).

    `a` (BM,) and `b` (BN,) point to the elements k = 0, which lie `a_k` and `b_k` apart; those beyond `rows` and
    `columns` (bool) are 0. float32 (BM, BN).
    """
    BLOCK: tl.constexpr = FORM[1]
    PROMOTE: tl.constexpr = FORM[2]
    total = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    squares = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    if PROMOTE == 0 and BLOCK == 1:
        total, squares = _run(
            a, a_k, rows, b, b_k, columns, 0, depth, squares, GRID, FORM, SQUARES, INTERPRETED
        )
    elif PROMOTE > 0:
        for start in range(0, depth, PROMOTE):
            stop = tl.minimum(start + PROMOTE, depth)
            partial, squares = _run(
                a, a_k, rows, b, b_k, columns, start, stop, squares, GRID, FORM, SQUARES, INTERPRETED
            )
            total = total + partial
    else:
        for start in range(0, depth, BLOCK):
            stop = tl.minimum(start + BLOCK, depth)
            partial, squares = _run(
                a, a_k, rows, b, b_k, columns, start, stop, squares, _FLOAT32, FORM, False, INTERPRETED
            )
            total = round_to(total + partial, GRID)
            if SQUARES:
                squares = fma(total, total, squares, INTERPRETED)
    return total, squares


@triton.jit
def _run(
    a, a_k, rows, b, b_k, columns, start, stop, squares,
    GRID: tl.constexpr, FORM: tl.constexpr, SQUARES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The sum over k = start..stop-1 from zero: strict steps, or those of a unit."""
    UNIT: tl.constexpr = FORM[3]
    acc = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    if UNIT > 0:
        for first in range(start, stop, UNIT):
            last = tl.minimum(first + UNIT, stop)
            acc = _unit_step(a, a_k, rows, b, b_k, columns, first, last, acc, GRID, FORM)
            if SQUARES:
                squares = fma(acc, acc, squares, INTERPRETED)
    else:
        for k in range(start, stop):
            left = tl.load(a + k * a_k, mask=rows, other=0.0)[:, None]
            right = tl.load(b + k * b_k, mask=columns, other=0.0)[None, :]
            if FORM[0]:
                acc = fma(left, right, acc, INTERPRETED)
            else:
                acc = acc + left * right
            acc = round_to(acc, GRID)
            if SQUARES:
                squares = fma(acc, acc, squares, INTERPRETED)
    return acc, squares


@triton.jit
def _exponent(x, floor):
    """max(floor(log2 |x|), floor) of float32 numbers, floor >= -126; far below all for 0, the floor for inf and NaN."""
    field = (x.to(tl.int32, bitcast=True) >> 23) & 255
    known = tl.where(field == 255, floor, tl.maximum(field - 127, floor))
    return tl.where(x == 0, _FAR_BELOW, known)


@triton.jit
def _power(exponent):
    """2^exponent in float64, exactly, for normal results."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _unit_step(
    a, a_k, rows, b, b_k, columns, first, last, running, GRID: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """The next value of a unit's accumulator: `unit_step` of `torchlamp.kernels.reference_units`."""
    MIN_EXPONENT: tl.constexpr = GRID[1]
    ZERO: tl.constexpr = FORM[8]
    largest = tl.maximum(tl.where(running == 0, ZERO, _exponent(running, MIN_EXPONENT)), ZERO)
    for k in range(first, last):
        left = _exponent(tl.load(a + k * a_k, mask=rows, other=0.0), FORM[6])[:, None]
        right = _exponent(tl.load(b + k * b_k, mask=columns, other=0.0), FORM[7])[None, :]
        largest = tl.maximum(largest, left + right)
    unit = _power(FORM[4] - largest)
    plain = running.to(tl.float64)
    total = (plain * unit).to(tl.int64)
    for k in range(first, last):
        left = tl.load(a + k * a_k, mask=rows, other=0.0).to(tl.float64)[:, None]
        right = tl.load(b + k * b_k, mask=columns, other=0.0).to(tl.float64)[None, :]
        product = left * right
        total += (product * unit).to(tl.int64)  # cut off toward zero; at most 2^42, and 1024 of them
        plain = plain + product
    finite = tl.abs(plain) < INFINITY
    sum_ = tl.where(finite, total, 0).to(tl.float64) * _power(largest - FORM[4])
    special = tl.where(plain == plain, plain.to(tl.float32), 0.0)
    nan = tl.full(special.shape, _NAN_BITS, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(finite, _round_once(sum_, GRID, FORM[5]), tl.where(plain == plain, special, nan))


@triton.jit
def _round_once(x, GRID: tl.constexpr, NEAREST: tl.constexpr):
    """float64 numbers rounded once to the grid of a unit; -0 becomes +0, and what is too large infinite."""
    MIN_EXPONENT: tl.constexpr = GRID[1]
    field = ((x.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32)
    scale = tl.maximum(field - 1023, MIN_EXPONENT) - GRID[0]
    steps = tl.abs(x) * _power(-scale)
    whole = steps.to(tl.int64)
    if NEAREST:
        rest = steps - whole.to(tl.float64)
        up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
        whole += up.to(tl.int64)
    value = whole.to(tl.float64) * _power(scale)
    largest = tl.full(value.shape, GRID[3], tl.float64)
    value = tl.where(value > largest, INFINITY, value)
    return tl.where(x < 0, -value, value).to(tl.float32) + 0.0
