"""How a key-value store keeps its numbers, what it recomputes, and what attention over it returns."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_BITS = {"int8": 8, "int4": 4}
_FULL = {"int16": torch.int16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StoreFormat:
    """How a store keeps keys and values.

    Parameters
    ----------
    keys, values : "int8" or "int4"
        The low-bit copies, in groups of 32 elements with a bfloat16 scale each.
    full : "int16", "float16" or "float32"
        The full-precision copies. "int16" is 16-bit integers in groups of 32 with a bfloat16 scale each: float16's
        memory and 3 % more, any magnitude, and ten times float16's accuracy on keys of real models.
    center : bool
        Low-bit keys, and full copies that aren't float32, are of the key minus the mean of the first keys seen, for
        each sample and head. The product with the mean is added back.
    hadamard : bool
        Low-bit keys are rotated by a Hadamard matrix, which spreads outliers over all elements of a key. The size of
        a key must be a power of two.

    Raises
    ------
    ValueError
        A name that isn't known.
    """

    keys: Literal["int8", "int4"] = "int8"
    values: Literal["int8", "int4"] = "int8"
    full: Literal["int16", "float16", "float32"] = "int16"
    center: bool = True
    hadamard: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("keys", _BITS), ("values", _BITS), ("full", _FULL)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")

    @property
    def key_bits(self) -> int:
        """Bits of a low-bit key's element."""
        return _BITS[self.keys]

    @property
    def value_bits(self) -> int:
        """Bits of a low-bit value's element."""
        return _BITS[self.values]

    @property
    def full_dtype(self) -> torch.dtype:
        """Of the full copies' elements."""
        return _FULL[self.full]

    @property
    def centred_copy(self) -> bool:
        """Whether the full copy of a key, too, is of the key minus the mean."""
        return self.center and self.full != "float32"


class Attended(NamedTuple):
    """What attention over a store returns."""

    #: float32 (batch, queries, heads, value size).
    output: Tensor
    #: Sums over the call: scores recomputed and visible, values read in full and visible. A value is counted once for
    #: all heads that share it.
    totals: tuple[int, int, int, int]
    #: int32: `recomputed`, `full_rows` and `visible`, one behind the other.
    counts: Tensor

    @property
    def recomputed(self) -> Tensor:
        """Scores recomputed, int32 (batch, heads, queries)."""
        batch, queries, heads, _ = self.output.shape
        return self.counts[: batch * queries * heads].view(batch, heads, queries)

    @property
    def full_rows(self) -> Tensor:
        """Values read in full precision, int32 (batch, key heads, queries)."""
        batch, queries, heads, _ = self.output.shape
        return self.counts[batch * queries * heads : -batch * queries].view(batch, -1, queries)

    @property
    def visible(self) -> Tensor:
        """Keys that a query sees, int32 (batch, queries)."""
        batch, queries, _, _ = self.output.shape
        return self.counts[-batch * queries :].view(batch, queries)


@dataclass(frozen=True)
class Thresholds:
    """What is recomputed and read in full.

    A score is recomputed iff 2 z (1 - z) s r > `scores`, a value is read in full iff z > `values` for any head of
    its group, and left out iff z <= `skip` / keys for all of them. A negative threshold takes everything, infinity
    nothing.
    """

    scores: float = 1e-5
    values: float = 1e-4
    skip: float = 2.0**-9
