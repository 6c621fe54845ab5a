"""Accumulation one number at a time: libm's fmaf, exact fractions for rounding, nothing of the package."""

import ctypes
import ctypes.util
import math
from fractions import Fraction

import torch

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fmaf.restype = ctypes.c_float
_libm.fmaf.argtypes = [ctypes.c_float] * 3
fmaf = _libm.fmaf


def float32(x):
    """The nearest float32. Of a product or a sum of two float32 numbers it is the correct rounding."""
    return ctypes.c_float(x).value


def round_exact(x, grid):
    """x on the grid, to nearest-even, in rational arithmetic."""
    if math.isnan(x):
        return x
    largest = Fraction(2) ** (grid.max_exponent - grid.mantissa_bits)
    largest *= 2 ** (grid.mantissa_bits + 1) - 1 - grid.top_codes_lost
    magnitude = None
    if not math.isinf(x):
        exponent = max(math.frexp(x)[1] - 1, grid.min_exponent) if x else grid.min_exponent
        spacing = Fraction(2) ** (exponent - grid.mantissa_bits)
        magnitude = round(Fraction(abs(x)) / spacing) * spacing
        if not grid.subnormals and magnitude < Fraction(2) ** grid.min_exponent:
            magnitude = Fraction(0)
    if magnitude is None or magnitude > largest:
        result = {"inf": math.inf, "nan": math.nan, "saturate": float(largest)}[grid.overflow]
    else:
        result = float(magnitude)
    negative = math.copysign(1.0, x) < 0
    if negative and not grid.signed:
        return 0.0
    if result == 0 and not grid.negative_zero:
        return 0.0
    return -result if negative else result


def accumulate(a, b, how, scaling=None):
    """The inner product of two lists and the sum of squares of its accumulator, by the definitions."""

    def step(x, y, acc):
        return fmaf(x, y, acc) if how.fused else float32(float32(x * y) + acc)

    squares = 0.0

    def strict(xs, ys, grid, note):
        nonlocal squares
        acc = 0.0
        for x, y in zip(xs, ys, strict=True):
            acc = step(x, y, acc) if grid is None else round_exact(step(x, y, acc), grid)
            if note:
                squares = fmaf(acc, acc, squares)
        return acc

    if how.promote:
        acc = 0.0
        for k in range(0, len(a), how.promote):
            part = strict(a[k : k + how.promote], b[k : k + how.promote], how.grid, True)
            acc = float32(acc + part)
    elif how.block > 1:
        acc = 0.0
        for k in range(0, len(a), how.block):
            part = strict(a[k : k + how.block], b[k : k + how.block], None, False)
            acc = round_exact(float32(acc + part), how.grid)
            squares = fmaf(acc, acc, squares)
    else:
        acc = strict(a, b, how.grid, True)
    if scaling is not None:
        acc = float32(acc * float32(scaling))
        acc = acc if how.promote else round_exact(acc, how.grid)
    return acc, squares


def products(a, b, how, scaling=None):
    """All entries of (G, M, K) times (Gb, K, N), and their sums of squares."""
    group = a.shape[0] // b.shape[0]
    rows, columns = a.tolist(), b.transpose(1, 2).tolist()
    entries = [
        [[accumulate(row, column, how, scaling) for column in columns[g // group]] for row in rows[g]]
        for g in range(len(rows))
    ]
    result = torch.tensor(entries, dtype=torch.float64).reshape(*a.shape[:2], b.shape[2], 2)
    return result[..., 0].float(), result[..., 1].float()
