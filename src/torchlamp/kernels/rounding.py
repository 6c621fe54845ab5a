"""Rounding float32 tensors to a `Grid`, exactly, with integer operations on their bit patterns.

Every mode is the same act: add something to the integer that holds the significand, then cut the low bits
off. What is added makes the mode: half a unit (less one, plus the last kept bit) for nearest-even, nothing
for truncation, a uniform random number for stochastic rounding. Above the grid's smallest normal number that
integer is the bit pattern itself, so that a carry runs into the exponent; below it, where the spacing is
constant, it is the significand in fixed point.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from torchlamp.kernels.specification import Grid

Mode = Literal["nearest_even", "toward_zero", "stochastic"]
MODES: tuple[Mode, ...] = get_args(Mode)

_FLOAT32_MANTISSA = 23
_FLOAT32_BIAS = 127
_SIGN_BIT = -(2**31)
#: Random bits behind one stochastic decision. A chance of rounding up is exact to 2^-62.
_RANDOM_BITS = 62


def round_to_grid(
    x: Tensor, grid: Grid, mode: Mode = "nearest_even", generator: torch.Generator | None = None
) -> Tensor:
    """Round every entry of `x` to the grid.

    Parameters
    ----------
    x
        float32, any shape, any device.
    grid
        The values allowed.
    mode
        "nearest_even"; "toward_zero" (finite numbers never overflow); "stochastic" (up or down in magnitude
        with a probability equal to the distance from the other neighbour).
    generator
        Needed by "stochastic". It may live on another device than `x`: the draws are made on the generator's
        device.

    Returns
    -------
    float32, the shape of `x`; `x` itself where there is nothing to round. NaN stays NaN, whatever the format.

    Raises
    ------
    ValueError
        When "stochastic" lacks its generator.
    """
    if mode == "stochastic" and generator is None:
        raise ValueError("mode 'stochastic' needs a generator, such as torch.Generator().manual_seed(0)")
    if grid.is_float32:
        return x
    x = x.resolve_neg()  # a lazily negated view, such as the imaginary part of a conjugate, has other bits
    if grid.has_float32_range and mode == "nearest_even":
        return _round_pattern(x, grid.mantissa_bits)
    return _round_any(x, grid, mode, generator)


def round_float64(x: Tensor, grid: Grid) -> Tensor:
    """Round float64 numbers to a grid of at most 21 mantissa bits, to nearest even, with one rounding: float32.

    Rounding to float32 first would round twice; what float32 cuts off is therefore kept as its last bit (round to
    odd), which no later rounding to so few bits can mistake for a tie.
    """
    near = x.float()
    away = near.double().abs() > x.abs()
    toward_zero = torch.where(away, torch.nextafter(near, torch.zeros_like(near)), near)
    inexact = (toward_zero.double() != x) & x.isfinite() & toward_zero.isfinite()
    odd = torch.where(inexact, (toward_zero.view(torch.int32) | 1).view(torch.float32), toward_zero)
    return round_to_grid(odd, grid)


def _round_pattern(x: Tensor, mantissa_bits: int) -> Tensor:
    """PS(mu) to nearest-even: half - 1 + the last kept bit is added to the pattern, then the low bits go."""
    shift = _FLOAT32_MANTISSA - mantissa_bits
    pattern = x.view(torch.int32)
    rounded = pattern >> shift
    rounded &= 1
    rounded += pattern
    rounded += (1 << (shift - 1)) - 1
    rounded &= -(1 << shift)
    return torch.where(x.isnan(), x, rounded.view(torch.float32))


def _round_any(x: Tensor, grid: Grid, mode: Mode, generator: torch.Generator | None) -> Tensor:
    pattern = x.view(torch.int32)
    magnitude = pattern & ~_SIGN_BIT
    random = None
    if mode == "stochastic":
        assert generator is not None
        draws = torch.randint(2**_RANDOM_BITS, x.shape, generator=generator, device=generator.device)
        random = draws.to(x.device)

    shift = _FLOAT32_MANTISSA - grid.mantissa_bits
    rounded = _drop(magnitude, shift, mode, random)
    result = (rounded << shift).to(torch.int32).view(torch.float32)
    if grid.min_exponent > 1 - _FLOAT32_BIAS:
        below_normal = magnitude < ((grid.min_exponent + _FLOAT32_BIAS) << _FLOAT32_MANTISSA)
        result = torch.where(below_normal, _round_subnormal(magnitude, grid, mode, random), result)

    result = _overflow(result, x, grid, mode)
    if not grid.subnormals:
        result = torch.where(result < grid.smallest_normal, 0.0, result)
    result = torch.copysign(result, x) if grid.signed else torch.where(pattern < 0, 0.0, result)
    if not grid.negative_zero:
        result = torch.where(result == 0, 0.0, result)
    return torch.where(x.isnan(), x, result)


def _drop(integer: Tensor, shift: int | Tensor, mode: Mode, random: Tensor | None) -> Tensor:
    """The quotient integer / 2^shift, rounded to an integer in the given mode."""
    if isinstance(shift, int) and shift == 0:
        return integer
    if mode == "toward_zero":
        return integer >> shift
    if mode == "stochastic":
        assert random is not None
        return (integer.long() + (random >> (_RANDOM_BITS - shift))) >> shift
    half = 1 << (shift - 1) if isinstance(shift, int) else torch.ones_like(shift) << (shift - 1)
    return (integer + ((integer >> shift) & 1) + (half - 1)) >> shift


def _round_subnormal(magnitude: Tensor, grid: Grid, mode: Mode, random: Tensor | None) -> Tensor:
    """Magnitudes below the smallest normal number, as multiples of the constant spacing there."""
    exponent = magnitude >> _FLOAT32_MANTISSA
    significand = magnitude & ((1 << _FLOAT32_MANTISSA) - 1)
    significand = torch.where(exponent > 0, significand | (1 << _FLOAT32_MANTISSA), significand)
    spacing_exponent = grid.min_exponent - grid.mantissa_bits
    # The significand counts units of 2^(exponent - bias - 23); float32's own subnormals share the exponent 1.
    shift = spacing_exponent + _FLOAT32_BIAS + _FLOAT32_MANTISSA - exponent.clamp(min=1)
    # A significand has 24 bits: from a shift of 26 on nothing is left of it, except for the random mode's
    # small chance.
    shift = shift.clamp(min=1, max=_RANDOM_BITS if mode == "stochastic" else 26)
    return _drop(significand, shift, mode, random).to(torch.float32) * 2.0**spacing_exponent


def _overflow(result: Tensor, x: Tensor, grid: Grid, mode: Mode) -> Tensor:
    """What becomes of magnitudes beyond the largest finite number; `result` is not negative."""
    too_large = result > grid.max_value
    if mode == "toward_zero" or grid.overflow == "saturate":
        kept = torch.where(too_large, grid.max_value, result)
        if grid.overflow == "saturate":
            return kept
        result, too_large = kept, x.isinf()
    return torch.where(too_large, torch.inf if grid.overflow == "inf" else torch.nan, result)
