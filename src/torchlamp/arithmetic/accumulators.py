"""Accumulators by name: a format and the way in which sums are formed in it."""

import math
import re
from dataclasses import dataclass, field, replace

from torchlamp.arithmetic.formats import Format
from torchlamp.arithmetic.integers import check_integers
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.units import UNITS, entering, floor_of, scale_of
from torchlamp.kernels.integer_products import Register
from torchlamp.kernels.online import OnlineFormats
from torchlamp.kernels.specification import Accumulation, Fuse

_COUNT = re.compile(r"(block|promote|online)([1-9][0-9]*)")
#: A unit's products and bits, which may stand in front, without a format, for float32.
_FUSE = re.compile(r"(?:^|/)fuse([1-9][0-9]*)/([1-9][0-9]*)(/nearest)?(?:/group([1-9][0-9]*))?(?=/|$)")

#: Rounding float64 numbers once needs two bits to spare in float32.
_MAX_ONLINE_BITS = 21

#: Accumulators that have a name of their own, and their spellings; a new one is one entry. A name has no '/', and none
#: of '@ . + , =', which separate the parts of a policy.
NAMED: dict[str, str] = {
    # The FP8 products of DeepSeek-V3 (arXiv 2412.19437, 3.3.2): sums of about 14 significant bits, added to float32
    # registers every 128 terms.
    "deepseek-fp8": "ps13/promote128",
    # LampAttention (arXiv 2609.39361): e4m3 scores in an online softmax, e4m11 for those that are recomputed.
    # `lamp8-ps` has the mantissas alone, as its authors simulate them.
    "lamp8": "e4m3fn-sat/online11",
    "lamp8-ps": "ps3/online11",
    **{name: unit.spelling for name, unit in UNITS.items()},
}
#: Accumulators that sum integers, by their spelling.
REGISTERS: dict[str, Register] = {"int32": Register(32), "int32/shift": Register(32, shift=True)}


@dataclass(frozen=True)
class Accumulator:
    """How inner products are accumulated, always in the order k = 0, 1, 2, ...

    Strict, the default: acc <- round(fma(a_k, b_k, acc)) at every step, the FMA in float32. Spelled as its format
    (`ps4`) and the options after it, `ps7/unfused`, `ps7/block32`, `ps13/promote128`, `ps7/unfused/promote128`. A
    matrix unit that aligns L products and the accumulator, truncates them to F bits and rounds their sum once is
    `FORMAT/fuseL/F`, float32 where no format is given: `fuse16/25`, `ps13/fuse32/13/promote128`; toward zero, or
    `/nearest`; `/groupG` aligns exact sums of G products by the scales of their operands. Or by its name in `NAMED`,
    such as `deepseek-fp8` or `hopper-fp8`, under which it is printed then. A name is only a name: an accumulator
    equals that of its spelling. `int32` sums the integers of integer operands exactly in 32 bits, as far as they share
    their scales, and `int32/shift` is the register of Tender, which shifts from scale to scale.

    At the site `scores`, `/onlineH` puts an online softmax with narrow exponentials after narrow sums, and recomputes
    scores with H mantissa bits (`kernels.online`); `/onlineH/stochastic` rounds the narrow sums up or down at random.

    References
    ----------
    Strict and block form: Budzinskiy et al., arXiv 2601.21623, the simulation of PS(mu). Promotion: what FP8
    matrix units do whose narrow sums are added to float32 registers every so many terms. Units: `Fuse`.
    """

    #: The format of the accumulator; a name is parsed.
    format: Format
    #: False: every product is rounded to float32 before it is added.
    fused: bool = True
    #: B > 1: B products are summed by float32 FMAs from zero, then acc <- round(acc + partial).
    block: int = 1
    #: B > 0: strict sums of B steps each from zero, each added to a float32 total.
    promote: int = 0
    #: A matrix unit's sums in place of strict ones.
    fuse: Fuse | None = None
    #: H > 0: an online softmax, whose recomputed scores have H mantissa bits.
    online: int = 0
    #: Whether narrow sums are rounded at random; only with `online`.
    stochastic: bool = False
    #: A register that sums integers; what is scaled of them is float32.
    register: Register | None = None
    #: The name in `NAMED` that it was asked for by; empty: it is printed as its format and options.
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", Format.parse(self.format))
        # Refuses a length out of range and a block together with a promotion.
        self.accumulation  # noqa: B018
        self._check_online()

    @classmethod
    def parse(cls, spelling: "str | Format | Accumulator") -> "Accumulator":
        """The accumulator of that spelling; an `Accumulator` stays as it is, a `Format` accumulates strictly.

        Raises
        ------
        ValueError
            An unknown name, format or option.
        TypeError
            Anything but a string, a format or an accumulator.
        """
        if isinstance(spelling, Accumulator):
            return spelling
        if isinstance(spelling, Format):
            return cls(spelling)
        if not isinstance(spelling, str):
            raise TypeError(
                f"an accumulator is a spelling like 'ps7/block32', got {type(spelling).__name__} {spelling!r}"
            )
        name, *options = spelling.strip().lower().split("/")
        if name == "int32":
            return cls._integer(spelling)
        if name in NAMED:
            return cls._named(name, options, spelling)
        rest, fuse = spelling.strip().lower(), None
        if match := _FUSE.search(rest):
            rest = (rest[: match.start()] or "fp32") + rest[match.end() :]
            fuse = Fuse(int(match[1]), int(match[2]), nearest=match[3] is not None, group=int(match[4] or 1))
            name, *options = rest.split("/")
        stochastic = "stochastic" in options
        fused, counts = _options([option for option in options if option != "stochastic"], spelling)
        if options.count("stochastic") > 1 or (stochastic and "online" not in counts):
            raise ValueError(
                f"accumulator {spelling!r}: /stochastic is an option of /onlineH, write for example "
                "'e4m3fn-sat/online11/stochastic'"
            )
        if not name.strip():
            raise ValueError(f"accumulator {spelling!r} lacks its format: write for example 'ps7/block32'")
        if counts.get("block", 1) > 1 and "promote" in counts:
            raise ValueError(
                f"accumulator {spelling!r}: /blockB and /promoteB exclude each other, use only one of them"
            )
        if fuse is not None and (not fused or "block" in counts):
            raise ValueError(
                f"accumulator {spelling!r}: a unit's sum, /fuseL/F, takes no option but /promoteB"
            )
        block, promote, online = counts.get("block", 1), counts.get("promote", 0), counts.get("online", 0)
        return cls(Format.parse(name), fused, block, promote, fuse, online, stochastic)

    @classmethod
    def _integer(cls, spelling: str) -> "Accumulator":
        register = REGISTERS.get(spelling.strip().lower())
        if register is None:
            raise ValueError(
                f"accumulator {spelling!r}: registers that sum integers are {', '.join(REGISTERS)}; they take no "
                "other option"
            )
        return cls(Format.parse("fp32"), register=register)

    @classmethod
    def _named(cls, name: str, options: list[str], spelling: str) -> "Accumulator":
        """What a name stands for; a unit may be promoted."""
        known = cls.parse(NAMED[name])
        match = _COUNT.fullmatch(options[0]) if name in UNITS and len(options) == 1 else None
        if match and match[1] == "promote":
            return replace(known, name=name, promote=int(match[2]))
        if options:
            allowed = "no option but /promoteB" if name in UNITS else "no options"
            raise ValueError(
                f"accumulator {spelling!r}: {name!r} stands for {NAMED[name]!r} and takes {allowed}; "
                f"write for example '{NAMED[name]}', with others"
            )
        return replace(known, name=name)

    def taking(self, left: Operand, right: Operand) -> "Accumulator":
        """The same for operands that are stored so: what a unit sums at a time depends on them.

        Raises
        ------
        ValueError
            An operand that the named unit or an integer register doesn't take.
        """
        if self.register is not None:
            for operand in (left, right):
                check_integers(operand, str(self), self.register.shift)
        if self.fuse is None:
            return self
        fuse = (
            self.fuse
            if self.fuse.group == 1
            else replace(self.fuse, scales=(scale_of(left), scale_of(right)))
        )
        if self.name not in UNITS:
            return replace(self, fuse=replace(fuse, floors=(floor_of(left), floor_of(right))))
        (a, low), (b, high) = entering(self.name, left), entering(self.name, right)
        return replace(self, fuse=replace(fuse, length=min(a, b), floors=(low, high)))

    def __str__(self) -> str:
        if self.register is not None:
            return f"int{self.register.bits}{'/shift' * self.register.shift}"
        if self.name:
            promoted = self.name in UNITS and self.promote
            return f"{self.name}/promote{self.promote}" if promoted else self.name
        parts = [str(self.format)]
        if self.fuse is not None:
            parts = [] if self.format.grid.is_float32 else parts
            parts.append(f"fuse{self.fuse.length}/{self.fuse.bits}" + "/nearest" * self.fuse.nearest)
            if self.fuse.group > 1:
                parts.append(f"group{self.fuse.group}")
        if not self.fused:
            parts.append("unfused")
        if self.block > 1:
            parts.append(f"block{self.block}")
        if self.promote:
            parts.append(f"promote{self.promote}")
        if self.online:
            parts.append(f"online{self.online}" + "/stochastic" * self.stochastic)
        return "/".join(parts)

    @property
    def accumulation(self) -> Accumulation:
        """What the kernels need to know."""
        return Accumulation(self.format.grid, self.fused, self.block, self.promote, self.fuse)

    def outside_attention(self) -> "Accumulator":
        """The same. ValueError for an online softmax, which only scores over keys have."""
        if self.online:
            raise ValueError(
                f"accumulator '{self}' has an online softmax, which only the site scores has: use '{self.format}'"
            )
        return self

    @property
    def recomputation(self) -> Accumulation:
        """How recomputed scores of an online softmax are summed: as the narrow ones, in the wider format."""
        return replace(self.accumulation, grid=self.online_formats.high)

    @property
    def online_formats(self) -> OnlineFormats:
        """The formats of an online softmax."""
        return OnlineFormats.of(self.format.grid, self.online)

    def _check_online(self) -> None:
        if not self.online:
            return
        lowest = self.format.grid.mantissa_bits + 1
        if not lowest <= self.online <= _MAX_ONLINE_BITS:
            raise ValueError(
                f"accumulator '{self}': /onlineH recomputes scores with H mantissa bits, more than {self.format} has: "
                f"allowed are {lowest} to {_MAX_ONLINE_BITS}"
            )
        if self.promote or self.fuse is not None or not self.format.grid.signed:
            raise ValueError(
                f"accumulator '{self}': /onlineH takes a signed format with strict sums, /unfused or /blockB; sums of "
                "/promoteB and units are float32"
            )
        if self.stochastic and (self.block > 1 or not self.fused):
            raise ValueError(
                f"accumulator '{self}': /stochastic goes with strict sums, without /blockB and /unfused"
            )

    @property
    def unit_roundoff(self) -> float:
        """U of the expected error (u / 2) sqrt(sum of squares of the accumulator after each rounding).

        Half the spacing of the format at 1. A unit truncates L products and its accumulator to multiples of
        q = 2^(E - F): at random their errors have the root mean square q sqrt((L + 1) / 3), about
        2^-F sqrt(L + 1) |s| / 2 for a sum s of the size 2^E.
        """
        if self.fuse is None:
            return self.format.unit_roundoff
        terms = math.sqrt(self.fuse.length + 1)
        return max(2.0**-self.fuse.bits * terms, 2 * self.format.unit_roundoff)

    @property
    def unit_roundoff_of_a_product(self) -> float:
        """The same where a rounding is counted for each product, as if sums were strict."""
        return self.unit_roundoff / math.sqrt(1 if self.fuse is None else self.fuse.length)


def _options(options: list[str], spelling: str) -> tuple[bool, dict[str, int]]:
    """Whether sums are fused, and the numbers of /blockB and /promoteB."""
    fused, counts = True, dict[str, int]()
    for option in options:
        match = _COUNT.fullmatch(option)
        if option == "unfused" and fused:
            fused = False
        elif match and match[1] not in counts:
            counts[match[1]] = int(match[2])
        else:
            raise ValueError(
                f"can't use option {option!r} in accumulator {spelling!r}; allowed after the format, "
                "once each: /unfused, either /blockB or /promoteB with B >= 1, /onlineH, or /fuseL/F with /promoteB"
            )
    return fused, counts
