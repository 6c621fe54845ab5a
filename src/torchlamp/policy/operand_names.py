"""The operands that can be spelled."""

import re

from torchlamp.arithmetic.operands import Operand

_KNOWN = re.compile(
    r"float32|int([2-9]|1[0-6])(/(32|row|tensor))?|(e4m3fn|e5m2|bf16|fp16)(/(row|tensor))?|mxfp[864]|nvfp4|tender[48]"
)
_NUMBER = re.compile(r"(?:int|mxfp|nvfp|tender)(\d+)")


def operand(name: str) -> Operand:
    """The operand of a name. ValueError for an unknown one."""
    if _KNOWN.fullmatch(name) is None:
        raise ValueError(f"unknown operand {name!r}")
    return Operand.parse(name)


def code_bits(of: Operand) -> int:
    """Bits of a code."""
    found = _NUMBER.match(of.name)
    return int(found[1]) if found else 16 if "16" in of.name else 8
