"""Operands by name: how the numbers that enter a product are stored, an element format and its scaling."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from torchlamp.arithmetic.formats import ELSEWHERE, Format
from torchlamp.kernels.constants import GROUP

#: What a group's scale is: none, a float32 number, a bfloat16 number rounded up, a power of two (E8M0, as the OCP
#: microscaling formats have it), an e4m3fn number times one float32 scale of the tensor (NVFP4), or one for each group
#: of channels of 256 vectors, all of them a float32 number times powers of two (Tender).
Scale = Literal["none", "float32", "bf16-up", "e8m0", "e4m3fn", "tender"]

#: How a list of operands describes a scale.
_SCALES: dict[Scale, str] = {
    "float32": "a float32 scale",
    "bf16-up": "a bfloat16 scale",
    "e8m0": "a power of two",
    "e4m3fn": "an e4m3fn scale times a float32 one of the tensor",
}

_INTEGER = re.compile(r"int([1-9][0-9]?)")
_GROUP = re.compile(r"[1-9][0-9]{0,6}")
_TENDER = re.compile(r"tender([1-9][0-9]?)/([1-9][0-9]?)(/down)?")
#: Bits and groups of Tender: with these a sum of 2^23 products fits 62 bits.
_TENDER_BITS, _TENDER_GROUPS = (2, 8), (1, 24)
_SMALLEST_INTEGER, _LARGEST_INTEGER = 2, 16


@dataclass(frozen=True)
class Block:
    """The shape of a scaled format: elements, how many numbers share a scale, and the scale's format."""

    #: A float format's name, or the bits of an integer whose codes are symmetric: |code| <= 2^(bits - 1) - 1.
    element: str | int
    #: Numbers along the sum that share a scale; 0: all of a row, -1: all of the tensor.
    length: int
    scale: Scale
    #: Groups of channels whose scales are powers of two apart (Tender), 0 for others; and whether every channel goes
    #: one group lower than its largest number asks for, where that is clipped.
    groups: int = 0
    down: bool = False

    @property
    def element_bits(self) -> int:
        """Bits of an element."""
        return self.element if isinstance(self.element, int) else Format.parse(self.element).bits

    @property
    def largest_code(self) -> int:
        """The largest code of an integer element."""
        assert isinstance(self.element, int)
        return (1 << (self.element - 1)) - 1

    @property
    def scale_bits(self) -> int:
        """Bits of a group's scale."""
        return {"none": 0, "float32": 32, "bf16-up": 16, "e8m0": 8, "e4m3fn": 8, "tender": 32}[self.scale]

    @property
    def summary(self) -> str:
        """One line for lists of operands."""
        element = f"{self.element}-bit integers" if isinstance(self.element, int) else self.element
        if self.scale == "none":
            return element
        if self.scale == "tender":
            return f"{element}; 256 rows, {self.groups} groups of channels, scales powers of two apart"
        shared = {0: "a row", -1: "a tensor"}.get(self.length, f"{self.length} numbers")
        return f"{element}; {shared}, {_SCALES[self.scale]}"


#: The block formats that have a name of their own; a new one is one entry.
BLOCKS: dict[str, Block] = {
    "mxfp8": Block("e4m3fn", 32, "e8m0"),
    "mxfp8-e5m2": Block("e5m2", 32, "e8m0"),
    "mxfp6": Block("e2m3fn", 32, "e8m0"),
    "mxfp6-e3m2": Block("e3m2fn", 32, "e8m0"),
    "mxfp4": Block("e2m1fn", 32, "e8m0"),
    "nvfp4": Block("e2m1fn", 16, "e4m3fn"),
}
_ALLOWED = (
    f"allowed: float32, int{_SMALLEST_INTEGER}..int{_LARGEST_INTEGER} (groups of 32, or /G, /row, /tensor), "
    f"a format such as e4m3fn, e5m2, bf16, fp16 (as it is, or /row, /tensor), {', '.join(BLOCKS)}, tenderB/G such as "
    "tender4/8"
)


@dataclass(frozen=True)
class Operand:
    """How numbers are stored before they are multiplied.

    Made by `Operand.parse`. The names: ``float32`` (as they are); integers ``int2``..``int16`` with ``/G`` (groups of
    G numbers along the sum with one scale each; ``int8`` is short for ``int8/32``), ``/row`` or ``/tensor``; a float
    format as it is (``bf16``) or with a scale for each row or tensor (``e4m3fn/row``); the OCP microscaling formats
    ``mxfp8 mxfp8-e5m2 mxfp6 mxfp6-e3m2 mxfp4``, and ``nvfp4``; ``tender4/8`` (4 bits, 8 groups of channels), also with
    ``/down``. docs/formats.md defines each.
    """

    #: The canonical spelling.
    name: str = "float32"
    #: Elements, group and scale; None stores the numbers as they are.
    block: Block | None = None

    @classmethod
    def parse(cls, spelling: "str | Operand") -> "Operand":
        """The operand of that name; an `Operand` is returned as it is.

        Raises
        ------
        ValueError
            An unknown name or scaling, with those that are allowed and the nearest.
        TypeError
            Anything but a string or an operand.
        """
        if isinstance(spelling, Operand):
            return spelling
        if not isinstance(spelling, str):
            raise TypeError(
                f"an operand is a name like 'int8/32', got {type(spelling).__name__} {spelling!r}"
            )
        name = spelling.strip().lower()
        if name in ("float32", "fp32"):
            return cls()
        if name in BLOCKS:
            return cls(name, BLOCKS[name])
        if name.startswith("tender"):
            return cls._tender(spelling, name)
        base, slash, shared = name.partition("/")
        if (
            slash
            and shared not in ("row", "tensor")
            and not (_INTEGER.fullmatch(base) and _GROUP.fullmatch(shared))
        ):
            raise ValueError(
                f"unknown scaling {'/' + shared!r} in operand {spelling!r}; allowed: /row, /tensor and, "
                "for integers, the length of a group such as /32"
            )
        if match := _INTEGER.fullmatch(base):
            return cls._integer(spelling, int(match[1]), shared or str(GROUP))
        try:
            element = Format.parse(base).name
        except ValueError:
            raise ValueError(f"unknown operand {spelling!r}{_suggestion(base)}; {_ALLOWED}") from None
        if not slash:
            return cls(element, Block(element, 0, "none"))
        return cls(f"{element}/{shared}", Block(element, 0 if shared == "row" else -1, "float32"))

    @classmethod
    def _integer(cls, spelling: str, bits: int, shared: str) -> "Operand":
        if not _SMALLEST_INTEGER <= bits <= _LARGEST_INTEGER:
            raise ValueError(f"operand {spelling!r}: integers have 2 to 16 bits; {_ALLOWED}")
        if shared in ("row", "tensor"):
            return cls(f"int{bits}/{shared}", Block(bits, 0 if shared == "row" else -1, "float32"))
        short = f"int{bits}" if int(shared) == GROUP else f"int{bits}/{int(shared)}"
        return cls(short, Block(bits, int(shared), "bf16-up"))

    @classmethod
    def _tender(cls, spelling: str, name: str) -> "Operand":
        match = _TENDER.fullmatch(name)
        bits, groups = (0, 0) if match is None else (int(match[1]), int(match[2]))
        fits = _TENDER_BITS[0] <= bits <= _TENDER_BITS[1] and groups <= _TENDER_GROUPS[1]
        if match is None or not fits:
            raise ValueError(
                f"operand {spelling!r}: Tender is tenderB/G with B = 2 to 8 bits and G = 1 to 24 groups of channels, "
                "and /down behind it if wanted; write for example 'tender4/8'"
            )
        return cls(name, Block(bits, 0, "tender", groups, match[3] is not None))

    def __str__(self) -> str:
        return self.name

    @property
    def is_tender(self) -> bool:
        """Whether it biases and groups channels, which only vectors on the left of a product do."""
        return self.block is not None and self.block.groups > 0

    @property
    def right(self) -> "Operand":
        """How the other side is stored where this is the operand of a product: itself, or Tender's of weights."""
        return Operand.parse(f"int{self.block.element}/row") if self.block and self.is_tender else self

    @property
    def is_float32(self) -> bool:
        """Whether storing changes nothing."""
        return self.block is None

    @property
    def kernel_bits(self) -> int | None:
        """Bits of a code of the copies that the decoding kernels read, 4, 8 or 12; None if they have no such copy."""
        block = self.block
        kernels = block is not None and block.length == GROUP and block.element in (4, 8, 12)
        return block.element if kernels and isinstance(block.element, int) else None  # type: ignore[union-attr]

    @property
    def bits(self) -> float:
        """Bits a number, the share of its group's scale included; scales of rows and tensors count as nothing."""
        if self.block is None:
            return 32.0
        shared = self.block.scale_bits / self.block.length if self.block.length > 0 else 0.0
        return self.block.element_bits + shared

    @property
    def summary(self) -> str:
        """One line for lists of operands."""
        return "as they are" if self.block is None else self.block.summary


def _suggestion(base: str) -> str:
    known = ["float32", *BLOCKS, "tender4/8", "int4", "int8", "int12", "e4m3fn", "e5m2", "bf16", "fp16"]
    nearest = [ELSEWHERE[base]] if base in ELSEWHERE else difflib.get_close_matches(base, known, n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""
