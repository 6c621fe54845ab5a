"""How a sum is formed before anything is recomputed: operand, accumulator and transforms, in one spelling."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torchlamp.arithmetic import accumulators
from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.formats import NAMED, Format
from torchlamp.arithmetic.operands import BLOCKS, Operand
from torchlamp.arithmetic.transforms import TRANSFORMS, Transform

T = TypeVar("T")
_FLOAT32_SUMS = Accumulator.parse("fp32")
_FLOAT32_NUMBERS = Operand()
#: The accumulator that Tender's operand was made for.
_SHIFTED_SUMS = Accumulator.parse("int32/shift")
_INTEGER = re.compile(r"int([2-9]|1[0-6])")
#: What a misspelt name is compared with.
_NAMES = (
    "float32", *NAMED, "e5m2", *(f"ps{bits}" for bits in range(1, 24)),
    *(f"int{bits}" for bits in range(2, 17)), "int8/row", "e4m3fn/row", *BLOCKS, "tender4/8",
    "tender8/8", "int32", "int32/shift",
)  # fmt: skip
SPELLING = (
    "write [operand@]accumulator[.transform...], for example 'ps4', 'int8.center' or 'mxfp4@ps13/promote128'"
)


@dataclass(frozen=True)
class Precision:
    """The operands of a product, the accumulator of its sums, and the exact changes made before either rounds.

    Printed and parsed as ``[operand@]accumulator[.transform...]``. A name alone is an accumulator with float32
    operands if it is a float format or a unit (``ps4``, ``bf16``), and a stored operand otherwise (``int8``,
    ``mxfp4``, ``e4m3fn/row``): only weights, keys or values are stored so, sums are formed as the decoding kernels
    form them, and the numbers in full stand beside the copy. Tender's operand alone (``tender4/8``) has the accumulator
    ``int32/shift``.

    Raises
    ------
    ValueError
        A transform that is named twice, a stored operand whose name alone is an accumulator's, or an operand that a
        unit or an integer register doesn't take.
    """

    operand: Operand = _FLOAT32_NUMBERS
    #: None for a stored operand: products are exact within a group and summed in float32 across groups.
    accumulator: Accumulator | None = None
    #: In the order of `TRANSFORMS`, whatever order they are given in; they are applied in this order.
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        given = [Transform.parse(transform) for transform in self.transforms]
        for transform in given:
            if given.count(transform) > 1:
                raise ValueError(f"transform {str(transform)!r} is named twice: name it once")
        order = list(TRANSFORMS.values())
        object.__setattr__(self, "transforms", tuple(sorted(given, key=order.index)))
        if self.accumulator is None and self.operand.is_float32:
            object.__setattr__(self, "accumulator", _FLOAT32_SUMS)
        if self.accumulator is None and self.operand.is_tender:
            object.__setattr__(self, "accumulator", _SHIFTED_SUMS)
        if self.accumulator is not None:
            object.__setattr__(self, "accumulator", self.accumulator.taking(self.operand, self.operand))
        block = self.operand.block
        if self.accumulator is None and block is not None and block.scale == "none":
            raise ValueError(
                f"operand '{self.operand}' alone is the name of an accumulator: write '{self.operand}@fp32' for both "
                f"operands, or '{self.operand}/row' for a stored copy"
            )

    @classmethod
    def parse(cls, spelling: "str | Precision | Accumulator | Operand | Format") -> "Precision":
        """Read a spelling; an accumulator or a format alone has float32 operands, an operand alone is stored.

        Raises
        ------
        ValueError
            A name that is none of an accumulator's, an operand's or a transform's, or a part that is missing.
        TypeError
            Anything but a spelling or one of these objects.
        """
        if isinstance(spelling, Precision):
            return spelling
        if isinstance(spelling, Accumulator | Format):
            return cls(accumulator=Accumulator.parse(spelling))
        if isinstance(spelling, Operand):
            return cls(spelling)
        if not isinstance(spelling, str):
            given = type(spelling).__name__
            raise TypeError(f"a precision is a spelling such as 'ps4', not {given} {spelling!r}: {SPELLING}")
        head, *names = (part.strip() for part in spelling.lower().split("."))
        transforms = tuple(_transform(name, spelling) for name in names)
        before, at, behind = (part.strip() for part in head.partition("@"))
        if not before or (at and not behind):
            raise ValueError(f"{spelling.strip()!r} lacks an accumulator or operand: {SPELLING}")
        if not at:
            operand, accumulator = _name_alone(before, spelling)
        else:
            operand, accumulator = _operand(before, spelling), _accumulator(behind, spelling)
        return cls(operand, accumulator, transforms)

    @property
    def is_stored(self) -> bool:
        """Whether only the stored side is low-bit: the form that decoding kernels run."""
        return self.accumulator is None

    @property
    def sums(self) -> Accumulator:
        """The accumulator; for a stored operand that of float32 sums."""
        return _FLOAT32_SUMS if self.accumulator is None else self.accumulator

    def with_transforms(self, transforms: "tuple[Transform, ...]") -> "Precision":
        """The same operand and accumulator with these transforms."""
        return Precision(self.operand, self.accumulator, transforms)

    def has(self, name: str) -> bool:
        """Whether the transform of this name is applied."""
        return TRANSFORMS[name] in self.transforms

    def __str__(self) -> str:
        if self.accumulator is None:
            head = str(self.operand)
        elif self.operand.is_float32:
            head = str(self.accumulator)
        else:
            head = f"{self.operand}@{self.accumulator}"
        return ".".join([head, *map(str, self.transforms)])


def _tried(parse: Callable[[str], T], name: str) -> tuple[T | None, ValueError | None]:
    try:
        return parse(name), None
    except ValueError as error:
        return None, error


def _name_alone(name: str, spelling: str) -> tuple[Operand, Accumulator | None]:
    """A float format or a unit is an accumulator; what else an operand can be, integers too, is stored."""
    accumulator, _ = _tried(Accumulator.parse, name)
    if accumulator is not None and not _INTEGER.fullmatch(name):
        return _FLOAT32_NUMBERS, accumulator
    operand, _ = _tried(Operand.parse, name)
    if operand is not None:
        return operand, None
    raise _unknown(name, spelling, "neither an accumulator nor an operand")


def _operand(name: str, spelling: str) -> Operand:
    operand, _ = _tried(Operand.parse, name)
    if operand is None:
        raise _unknown(name, spelling, "no operand, which stands before '@'")
    return operand


def _accumulator(name: str, spelling: str) -> Accumulator:
    accumulator, _ = _tried(Accumulator.parse, name)
    if accumulator is None:
        raise _unknown(name, spelling, "no accumulator, which stands behind '@'")
    return accumulator


def _unknown(name: str, spelling: str, what: str) -> ValueError:
    """What is wrong with a name: its options, if what stands before them is known, or else all of it."""
    base, slash, _ = name.partition("/")
    if name.startswith("tender"):
        _, reason = _tried(Operand.parse, name)
        if reason is not None:
            return reason
    if slash:
        for parse in (Accumulator.parse, Operand.parse):
            known, _ = _tried(parse, base)
            _, reason = _tried(parse, name)
            if known is not None and reason is not None:
                return reason
    near = difflib.get_close_matches(name, (*_NAMES, *accumulators.NAMED), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    where = "" if spelling.strip() == name else f" in {spelling.strip()!r}"
    return ValueError(
        f"{name!r}{where} is {what}: {hint}accumulators are ps1..ps23, {', '.join(NAMED)}, eXmY, ueXmY, with "
        f"options such as /block32, units as fuse16/25, {', '.join(accumulators.NAMED)}, int32, int32/shift; "
        "operands float32, int2..int16 (or with /G, /row, /tensor), these formats (as they "
        f"are, or with /row, /tensor), {', '.join(BLOCKS)}, tenderB/G"
    )


def _transform(name: str, spelling: str) -> Transform:
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    near = difflib.get_close_matches(name, TRANSFORMS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown transform {name!r} in {spelling.strip()!r}: {hint}allowed behind a '.' are {', '.join(TRANSFORMS)}"
    )
