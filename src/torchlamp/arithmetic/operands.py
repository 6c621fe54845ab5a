"""Operands: how the numbers that enter a product are stored, a number format and its scaling, by name."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operand:
    """How numbers are stored before they are multiplied; the default stores them as they are.

    Made by `Operand.parse`: ``float32``; integers ``int2``..``int16`` with ``/32`` (groups of 32 along the sum, one
    scale each; ``int8`` is short for ``int8/32``), ``/row`` or ``/tensor``; ``e4m3fn``, ``e5m2``, ``bf16``, ``fp16``
    with ``/row`` or ``/tensor``; the blocks ``mxfp8 mxfp6 mxfp4`` and ``nvfp4``.
    """

    #: The canonical spelling.
    name: str = "float32"

    @classmethod
    def parse(cls, spelling: "str | Operand") -> "Operand":
        """The operand of that name."""
        if isinstance(spelling, Operand):
            return spelling
        return cls({"int4/32": "int4", "int8/32": "int8", "int12/32": "int12"}.get(spelling, spelling))

    def __str__(self) -> str:
        return self.name

    @property
    def is_float32(self) -> bool:
        """Whether storing changes nothing."""
        return self.name == "float32"

    @property
    def kernel_bits(self) -> int | None:
        """Bits of a code of the copies that the decoding kernels read, 4, 8 or 12; None if they have no such copy."""
        return {"int4": 4, "int8": 8, "int12": 12}.get(self.name)

    @property
    def bits(self) -> float:
        """Bits a number, scales included."""
        raise NotImplementedError


def quantise(x: Tensor, operand: str | Operand, dim: int = -1) -> Tensor:
    """The values that stored numbers stand for: float32, the shape of `x`; groups run along `dim`."""
    raise NotImplementedError


__all__ = ["Operand", "quantise", "torch"]
