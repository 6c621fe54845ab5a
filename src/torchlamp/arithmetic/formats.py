"""Number formats by name: the table, the grammar of the generic names, and the modifiers."""

import difflib
import re
from dataclasses import dataclass, replace

import torch

from torchlamp.kernels.specification import Grid


def _ieee_like(exponent_bits: int, mantissa_bits: int, signed: bool = True) -> Grid:
    """The largest exponent code holds infinity and NaN, as in IEEE 754."""
    bias = 2 ** (exponent_bits - 1) - 1
    return Grid(mantissa_bits, 1 - bias, bias, signed=signed, negative_zero=signed)


def _fnuz(exponent_bits: int, mantissa_bits: int, bias: int) -> Grid:
    """Finite, with one NaN in the place of -0, so that every exponent code holds numbers."""
    top = 2**exponent_bits - 1 - bias
    return Grid(mantissa_bits, 1 - bias, top, overflow="nan", negative_zero=False)


def _finite_only(exponent_bits: int, mantissa_bits: int) -> Grid:
    """The element types of microscaling blocks: neither infinity nor NaN, so that overflow saturates."""
    bias = 2 ** (exponent_bits - 1) - 1
    return Grid(mantissa_bits, 1 - bias, 2**exponent_bits - 1 - bias, overflow="saturate")


#: The formats whose names don't follow from the grammar.
NAMED: dict[str, Grid] = {
    "fp32": Grid(),
    "tf32": _ieee_like(8, 10),
    "bf16": _ieee_like(8, 7),
    "fp16": _ieee_like(5, 10),
    "e4m3fn": Grid(3, -6, 8, top_codes_lost=1, overflow="nan"),
    "e4m3fnuz": _fnuz(4, 3, bias=8),
    "e5m2fnuz": _fnuz(5, 2, bias=16),
    "e4m3b11fnuz": _fnuz(4, 3, bias=11),
    "e2m1fn": _finite_only(2, 1),
    "e2m3fn": _finite_only(2, 3),
    "e3m2fn": _finite_only(3, 2),
}

#: What these formats are called elsewhere: not accepted, so that every format has one name, but understood.
ELSEWHERE = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "fp8": "e4m3fn"}

#: The formats of torch's types.
DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2: "e5m2",
    torch.float8_e5m2fnuz: "e5m2fnuz",
}

_PS = re.compile(r"ps([0-9]{1,2})")
_GENERIC = re.compile(r"(u?)e([0-9])m([0-9]{1,2})")
_ALLOWED = (
    f"allowed: ps1..ps23, {', '.join(NAMED)}, eXmY and ueXmY (X 2..8, Y 1..23), "
    "with -sat or -flush behind the name if wanted"
)


@dataclass(frozen=True)
class Format:
    """A number format: a set of float32 values to round to, under the name that prints and parses back.

    Make one with `Format.parse`. The names: `ps1`..`ps23` (float32 with that many stored mantissa bits),
    `fp32 tf32 bf16 fp16`, `e4m3fn e4m3fnuz e5m2fnuz e4m3b11fnuz e2m1fn e2m3fn e3m2fn` as hardware and
    ml_dtypes define them, and the generic `eXmY` / `ueXmY` (IEEE-like with infinity; `u` is unsigned), which
    cover `e5m2 e4m3 e3m4`. Behind a name, `-sat` makes overflow saturate and `-flush` turns subnormal results
    into zero. docs/formats.md defines each.
    """

    #: The canonical spelling, modifiers included.
    name: str
    #: What the kernels need to know.
    grid: Grid

    @classmethod
    def parse(cls, spelling: "str | torch.dtype | Format") -> "Format":
        """The format of that name or of that torch type; a `Format` is returned as it is.

        Raises
        ------
        ValueError
            For an unknown name, with the allowed ones and the nearest.
        TypeError
            For anything but a string, a type that is one of `DTYPES`, or a format.
        """
        if isinstance(spelling, Format):
            return spelling
        if isinstance(spelling, torch.dtype):
            if spelling not in DTYPES:
                raise TypeError(f"{spelling} is no format; allowed types: {', '.join(map(str, DTYPES))}")
            spelling = DTYPES[spelling]
        if not isinstance(spelling, str):
            raise TypeError(f"a format is a name like 'ps4', got {type(spelling).__name__}: {spelling!r}")
        base, *modifiers = spelling.strip().lower().split("-")
        grid = _base_grid(base)
        if grid is None:
            raise ValueError(f"unknown format {spelling!r}{_suggestion(base)}; {_ALLOWED}")
        if unknown := set(modifiers) - {"sat", "flush"}:
            raise ValueError(
                f"unknown modifier {'-' + min(unknown)!r} in format {spelling!r}; allowed: -sat and -flush"
            )
        # A modifier that changes nothing isn't part of the name: e2m1fn saturates anyway.
        name = base
        if "sat" in modifiers and grid.overflow != "saturate":
            grid, name = replace(grid, overflow="saturate"), f"{name}-sat"
        if "flush" in modifiers:
            grid, name = replace(grid, subnormals=False), f"{name}-flush"
        return cls(name, grid)

    def __str__(self) -> str:
        return self.name

    @property
    def layout(self) -> str:
        """Its bits from the left: "s1 e5 m10" is a sign, 5 bits of exponent and 10 of stored mantissa."""
        exponent = self.bits - self.grid.mantissa_bits - int(self.grid.signed)
        return f"{'s1 ' if self.grid.signed else ''}e{exponent} m{self.grid.mantissa_bits}"

    @property
    def unit_roundoff(self) -> float:
        """2^-(mantissa bits + 1): bounds the relative error of rounding to nearest."""
        return 2.0 ** -(self.grid.mantissa_bits + 1)

    @property
    def bits(self) -> int:
        """Bits that a number of the format is stored in: sign, exponent and stored mantissa."""
        exponents = (
            self.grid.max_exponent - self.grid.min_exponent + 2
        )  # subnormal numbers have a code of their own
        return int(self.grid.signed) + (exponents - 1).bit_length() + self.grid.mantissa_bits

    @property
    def max(self) -> float:
        """The largest finite number."""
        return self.grid.max_value

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal number."""
        return self.grid.smallest_normal

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number; with -flush that is the smallest normal one."""
        if not self.grid.subnormals:
            return self.grid.smallest_normal
        return 2.0 ** (self.grid.min_exponent - self.grid.mantissa_bits)


def _base_grid(base: str) -> Grid | None:
    """The grid of a name without modifiers, None for an unknown one; numbers have no leading zeros."""
    if base in NAMED:
        return NAMED[base]
    if (match := _PS.fullmatch(base)) and 1 <= int(match[1]) <= 23 and match[1][0] != "0":
        return Grid(mantissa_bits=int(match[1]))
    if match := _GENERIC.fullmatch(base):
        exponent_bits, mantissa_bits = int(match[2]), int(match[3])
        if 2 <= exponent_bits <= 8 and 1 <= mantissa_bits <= 23 and match[3][0] != "0":
            return _ieee_like(exponent_bits, mantissa_bits, signed=not match[1])
    return None


def _suggestion(base: str) -> str:
    if match := re.fullmatch(r"ps([0-9]+)", base):
        return f", did you mean 'ps{min(max(int(match[1]), 1), 23)}'?"
    known = [*NAMED, "e5m2", *(f"ps{bits}" for bits in range(1, 24))]
    nearest = [ELSEWHERE[base]] if base in ELSEWHERE else difflib.get_close_matches(base, known, n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""
