"""What a kernel must know of a number format and of an accumulator: numbers, no names.

The room above (`arithmetic`) gives these names and spellings; the kernels, native and torch alike, see only this.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from torchlamp.kernels.constants import OVERFLOWS

Overflow = Literal["inf", "nan", "saturate"]


@dataclass(frozen=True)
class Grid:
    """The set of values a result is rounded to, as a subset of float32.

    The defaults describe float32 itself; with only `mantissa_bits` changed they describe PS(mu): float32's exponent
    range with mu stored mantissa bits, rounding on the bit pattern, so that overflow carries into infinity.
    """

    #: Stored mantissa bits, 1..23; the implicit leading bit is not counted.
    mantissa_bits: int = 23
    #: Exponent of the smallest normal number, -126..0; below it the spacing stays constant (subnormal numbers).
    min_exponent: int = -126
    #: Exponent of the largest finite number, 0..127.
    max_exponent: int = 127
    #: Mantissa codes taken away from the top binade (e4m3fn gives up 1 of 8 to NaN; most formats none).
    top_codes_lost: int = 0
    #: What a result beyond the largest finite number becomes.
    overflow: Overflow = "inf"
    #: False: results smaller in magnitude than the smallest normal number become zero (after rounding).
    subnormals: bool = True
    #: False: negative results become +0.
    signed: bool = True
    #: False: -0 becomes +0.
    negative_zero: bool = True

    @property
    def max_value(self) -> float:
        """The largest finite number."""
        code = (2 << self.mantissa_bits) - 1 - self.top_codes_lost
        return math.ldexp(code, self.max_exponent - self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal number."""
        return 2.0**self.min_exponent

    @property
    def is_float32(self) -> bool:
        """Whether rounding to this grid changes nothing."""
        return self == Grid()

    @property
    def has_float32_range(self) -> bool:
        """Whether only the mantissa is narrow, so that rounding is one operation on the bit pattern."""
        return self == Grid(mantissa_bits=self.mantissa_bits)


@dataclass(frozen=True)
class Fuse:
    """A matrix unit: some products and the accumulator aligned, truncated, summed exactly, and rounded once.

    Let e(x) = max(floor(log2 |x|), floor) be a number's exponent, and e(a) + e(b) that of a nonzero product a b. With E
    the largest exponent among `length` products and the accumulator, all terms are truncated toward zero to multiples
    of q = 2^(E - bits), and their exact sum is rounded to the grid. Zero terms count with `zero_exponent(grid)`.

    `group` > 1 is the adder of block-scaled operands: a term is the exact sum of `group` products, and its exponent
    that of the left scale plus that of the right one, whatever the elements are.

    Source: the models of hardware in mmasim (PyPI), which they were measured for; arXiv 2512.07004.
    """

    #: L: products that are summed at a time, 1..1024.
    length: int
    #: F: fractional bits of the aligned terms, 1..40.
    bits: int
    #: True: the sum is rounded to nearest, ties to even; False: toward zero.
    nearest: bool = False
    #: Exponents below which left and right operands are subnormal numbers of the format that they are stored in.
    floors: tuple[int, int] = (-126, -126)
    #: G > 1: the products of G neighbours are summed exactly and enter as one term, aligned by its two scales.
    group: int = 1
    #: Of the left and of the right operand, for groups: how many numbers share a scale, 0 for a scale of 1, and the
    #: factor between the largest of them and a number with the scale's exponent.
    scales: tuple[tuple[int, float], tuple[int, float]] = ((16, 4.0), (16, 4.0))

    def __post_init__(self) -> None:
        if self.length % self.group:
            raise ValueError(f"fuse{self.length}/{self.bits}/group{self.group}: groups must fill the length")
        if not 1 <= self.length <= 1024 or not 1 <= self.bits <= 40:
            raise ValueError(
                f"fuse{self.length}/{self.bits}: allowed are 1 to 1024 products and 1 to 40 bits"
            )

    def zero_exponent(self, grid: Grid) -> int:
        """The exponent of a zero term: five to seven below the smallest normal exponent, by the unit's bits.

        Of groups, 13 below.
        """
        if self.group > 1:
            return grid.min_exponent - 13
        return grid.min_exponent - max(5, self.bits - 18)


@dataclass(frozen=True)
class Accumulation:
    """How the sum of K products is formed on a grid, always in the order k = 0, 1, 2, ...

    Strict (`block` = 1, `promote` = 0): acc <- round(fma(a_k, b_k, acc)) at every step.
    `block` = B > 1: the B products of a block are summed by float32 FMAs from zero, then acc <- round(acc + partial).
    `promote` = B > 0: strict sums of B steps each from zero, each added to a float32 total.
    `fused` = False: every product is rounded to float32 before it is added.
    `fuse`: sums of a matrix unit in place of strict ones; with `promote`, each run of B products starts from zero.
    """

    grid: Grid
    fused: bool = True
    block: int = 1
    promote: int = 0
    fuse: Fuse | None = None

    @property
    def result(self) -> Grid:
        """The grid that finished sums are rounded to again once scaled.

        Float32 for promoted sums and those of a unit, whose registers are float32 whatever the sums are rounded to.
        """
        return Grid() if self.promote or self.fuse else self.grid

    @property
    def period(self) -> int:
        """How many products belong together, so that it matters where their count starts; 1 for strict sums."""
        return self.promote or (self.block if self.fuse is None else self.fuse.length)

    def __post_init__(self) -> None:
        if self.block < 1 or self.promote < 0 or (self.block > 1 and self.promote > 0):
            raise ValueError(
                f"block={self.block}, promote={self.promote}: block must be >= 1, promote >= 0, "
                "and only one of them used"
            )
        if self.fuse is None:
            return
        if self.block > 1 or not self.fused:
            raise ValueError("a unit's sum goes with neither block > 1 nor fused=False")
        if self.promote % self.fuse.group:
            raise ValueError(
                f"promote={self.promote}: runs must be whole groups of {self.fuse.group} products"
            )
        plain = replace(self.grid, mantissa_bits=23, min_exponent=-126, max_exponent=127)
        if not plain.is_float32:
            raise ValueError("a unit's sum is rounded to a signed format with infinities and subnormals")


#: Lengths beyond any sum reach the native kernels as the largest that they can take.
_LONGEST = 2**31 - 1


def accumulation_numbers(accumulation: Accumulation) -> tuple[int | bool, ...]:
    """An accumulation as the native kernels are told it; a unit of length 0 is none."""
    g, fuse = accumulation.grid, accumulation.fuse
    unit: tuple[int | bool, ...] = (0, 1, False, 0, 0, 0)
    if fuse is not None:
        unit = (fuse.length, fuse.bits, fuse.nearest, *fuse.floors, fuse.zero_exponent(g))
    return (
        g.mantissa_bits,
        g.min_exponent,
        g.max_exponent,
        g.top_codes_lost,
        OVERFLOWS.index(g.overflow),
        g.subnormals,
        g.signed,
        g.negative_zero,
        accumulation.fused,
        min(accumulation.block, _LONGEST),
        min(accumulation.promote, _LONGEST),
        *unit,
    )
