"""Matrix units by name: the adder of tensor cores, and the operands that each unit takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from torchlamp.arithmetic.formats import Format
from torchlamp.arithmetic.operands import Block, Operand
from torchlamp.kernels.rounding import round_to_grid
from torchlamp.kernels.specification import Grid

_FLOOR = Grid().min_exponent


@dataclass(frozen=True)
class Unit:
    """An accumulator's spelling, and how many products it sums at a time by the format of its operands.

    A unit reads a fixed number of bytes at a time, so that a wider format means fewer products. Source of all figures:
    mmasim 2.1 (PyPI), models that were measured against hardware.
    """

    #: What the name stands for; operands in float32, which no unit takes, meet this adder as they are.
    spelling: str
    #: L by the formats that the unit takes, the preferred first.
    lengths: Mapping[str, int]


def _unit(spelling: str, *formats: str, **lengths: int) -> Unit:
    length = int(spelling.partition("fuse")[2].partition("/")[0])
    return Unit(spelling, dict.fromkeys(formats, length) | lengths)


_FP8 = ("e4m3fn", "e5m2")
_BELOW_FP8 = ("e3m2fn", "e2m3fn", "e2m1fn")

#: A new unit is one entry.
UNITS: dict[str, Unit] = {
    "volta": _unit("fuse4/23", "fp16"),
    "turing": _unit("fuse8/24", "fp16"),
    "ampere": _unit("fuse8/24", "fp16", "bf16", tf32=4),
    "ada": _unit("fuse8/24", "fp16", "bf16", tf32=4),
    "ada-fp8": _unit("ps13/fuse16/13", *_FP8),
    "hopper": _unit("fuse16/25", "fp16", "bf16", tf32=8),
    "hopper-fp8": _unit("ps13/fuse32/13", *_FP8),
    "blackwell": _unit("fuse16/25", "fp16", "bf16", tf32=8),
    "blackwell-fp8": _unit("fuse32/25", *_FP8, *_BELOW_FP8),
    "blackwell-fp4": _unit("fuse64/35/group16", "e2m1fn"),
}


def entering(name: str, operand: Operand) -> tuple[int, int]:
    """How many products of such operands the named unit sums at a time, and the exponent below which they are
    subnormal numbers.

    An operand enters in the first format of the unit that holds its elements: `int4` as `e4m3fn`, `ps4` as `bf16`.
    `float32` meets the unit's adder as it is.

    Raises
    ------
    ValueError
        An operand that fits none of the unit's formats.
    """
    unit = UNITS[name]
    if operand.block is None:
        return next(iter(unit.lengths.values())), _FLOOR
    for format, length in unit.lengths.items():
        if _holds(Format.parse(format).grid, operand.block):
            return length, _floor(operand.block, Format.parse(format).grid)
    first = next(iter(unit.lengths))
    raise ValueError(
        f"operand '{operand}' can't enter the unit '{name}', which takes {', '.join(unit.lengths)} and what these "
        f"hold: write '{first}@{name}', or '{operand}@{unit.spelling}' for its adder with operands as they are"
    )


def held(name: str, x: Tensor) -> Operand:
    """The first format of the named unit that holds all numbers of a float32 tensor; float32 if there is none."""
    for format in UNITS[name].lengths if name in UNITS else ():
        if bool((round_to_grid(x, Format.parse(format).grid).eq(x) | x.isnan()).all()):
            return Operand.parse(format)
    return Operand()


def floor_of(operand: Operand) -> int:
    """The exponent below which an operand's numbers are subnormal: its format's where it has no scale."""
    block = operand.block
    if block is None or block.scale != "none":
        return _FLOOR
    return Format.parse(str(block.element)).grid.min_exponent


def scale_of(operand: Operand) -> tuple[int, float]:
    """How many numbers share a scale, 0 for none, and the largest of them in units of the scale's power of two.

    An MX scale is the power of two that brings the largest number into the top binade of the elements; other scales
    bring it to the largest element. Numbers that are stored as float32 are taken for MX blocks of 16.
    """
    block = operand.block
    if block is None:
        return 16, 4.0
    if block.scale == "none":
        return 0, 1.0
    if isinstance(block.element, int):
        largest = 2.0 ** (block.element - 1) - 1
    else:
        grid = Format.parse(block.element).grid
        largest = 2.0**grid.max_exponent if block.scale == "e8m0" else grid.max_value
    return block.length or -1, largest


def _floor(block: Block, grid: Grid) -> int:
    """Numbers that have a scale are aligned by their own exponents: what is subnormal depends on the scale."""
    return grid.min_exponent if block.scale == "none" else _FLOOR


def _holds(grid: Grid, block: Block) -> bool:
    """Whether a block's elements are numbers of the grid."""
    if isinstance(block.element, int):  # codes up to 2^(bits - 1) - 1
        return block.element - 2 <= grid.mantissa_bits and 2.0 ** (block.element - 1) <= grid.max_value
    element = Format.parse(block.element).grid
    smallest = 2.0 ** (element.min_exponent - element.mantissa_bits)
    return (
        element.mantissa_bits <= grid.mantissa_bits
        and element.max_value <= grid.max_value
        and smallest >= 2.0 ** (grid.min_exponent - grid.mantissa_bits)
    )
