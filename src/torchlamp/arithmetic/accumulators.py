"""Accumulators by name: a format and the way in which sums are formed in it."""

import re
from dataclasses import dataclass, field, replace

from torchlamp.arithmetic.formats import Format
from torchlamp.kernels.specification import Accumulation

_COUNT = re.compile(r"(block|promote)([1-9][0-9]*)")

#: Accumulators that have a name of their own, and their spellings; a new one is one entry. A name has no '/', and none
#: of '@ . + , =', which separate the parts of a policy.
NAMED: dict[str, str] = {
    # The FP8 products of DeepSeek-V3 (arXiv 2412.19437, 3.3.2): sums of about 14 significant bits, added to float32
    # registers every 128 terms.
    "deepseek-fp8": "ps13/promote128",
}


@dataclass(frozen=True)
class Accumulator:
    """How inner products are accumulated, always in the order k = 0, 1, 2, ...

    Strict, the default: acc <- round(fma(a_k, b_k, acc)) at every step, the FMA in float32. Spelled as its
    format (`ps4`) and the options behind it, `ps7/unfused`, `ps7/block32`, `ps13/promote128`,
    `ps7/unfused/promote128`; or by its name in `NAMED`, such as `deepseek-fp8`, under which it is printed then. A name
    is only a name: an accumulator equals that of its spelling.

    References
    ----------
    Strict and block form: Budzinskiy et al., arXiv 2601.21623, the simulation of PS(mu). Promotion: what FP8
    matrix units do whose narrow sums are added to float32 registers every so many terms.
    """

    #: The format of the accumulator; a name is parsed.
    format: Format
    #: False: every product is rounded to float32 before it is added.
    fused: bool = True
    #: B > 1: B products are summed by float32 FMAs from zero, then acc <- round(acc + partial).
    block: int = 1
    #: B > 0: strict sums of B steps each from zero, each added to a float32 total.
    promote: int = 0
    #: The name in `NAMED` that it was asked for by; empty: it is printed as its format and options.
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", Format.parse(self.format))
        # Refuses a length out of range and a block together with a promotion.
        Accumulation(self.format.grid, self.fused, self.block, self.promote)

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
        if name in NAMED:
            if options:
                raise ValueError(
                    f"accumulator {spelling!r}: {name!r} stands for {NAMED[name]!r} and takes no options; "
                    f"write for example '{NAMED[name]}', with others"
                )
            return replace(cls.parse(NAMED[name]), name=name)
        fused, counts = True, dict[str, int]()
        for option in options:
            match = _COUNT.fullmatch(option)
            if option == "unfused" and fused:
                fused = False
            elif match and match[1] not in counts:
                counts[match[1]] = int(match[2])
            else:
                raise ValueError(
                    f"can't use option {option!r} in accumulator {spelling!r}; allowed behind the format, "
                    "once each: /unfused, and either /blockB or /promoteB with B >= 1"
                )
        if not name.strip():
            raise ValueError(f"accumulator {spelling!r} lacks its format: write for example 'ps7/block32'")
        if counts.get("block", 1) > 1 and "promote" in counts:
            raise ValueError(
                f"accumulator {spelling!r}: /blockB and /promoteB exclude each other, use only one of them"
            )
        return cls(Format.parse(name), fused, counts.get("block", 1), counts.get("promote", 0))

    def __str__(self) -> str:
        if self.name:
            return self.name
        parts = [str(self.format)]
        if not self.fused:
            parts.append("unfused")
        if self.block > 1:
            parts.append(f"block{self.block}")
        if self.promote:
            parts.append(f"promote{self.promote}")
        return "/".join(parts)

    @property
    def accumulation(self) -> Accumulation:
        """What the kernels need to know."""
        return Accumulation(self.format.grid, self.fused, self.block, self.promote)
