"""The tensors of a key-value store: their names, and how they are allocated, enlarged and reordered."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.constants import ROWS
from torchlamp.kernels.reference_lowbit import code_bytes, group_count

#: Names of the tensors that make up a store; docs/decoding.md gives the layouts.
TENSORS = ("key_codes", "key_scales", "key_errors", "value_codes", "value_scales", "full_keys", "full_values")


@dataclass(frozen=True)
class StoreOptions:
    """How a store keeps the keys and values that are appended.

    Attributes
    ----------
    key_bits, value_bits : int
        4 or 8.
    full : torch.dtype
        Of the full-precision copies: float16 or float32.
    center : bool
        Quantise keys less the mean of the first ones; softmax doesn't see the difference, which is a constant.
    hadamard : bool
        Quantise keys times the Hadamard matrix, whose products with equally rotated queries are the same.
    """

    key_bits: int = 8
    value_bits: int = 8
    full: torch.dtype = torch.float16
    center: bool = True
    hadamard: bool = False

    def __post_init__(self) -> None:
        for name, bits in (("key", self.key_bits), ("value", self.value_bits)):
            if bits not in (4, 8):
                raise ValueError(f"{name}_bits={bits}: the cache keeps 4 or 8 bits")
        if self.full not in (torch.float16, torch.float32):
            raise ValueError(f"full={self.full}: full copies are torch.float16 or torch.float32")


def whole_blocks(slots: int) -> int:
    """The slots of as many blocks as hold `slots`."""
    return -(-slots // ROWS) * ROWS


def allocate(
    options: StoreOptions, batch: int, heads: int, sizes: tuple[int, int], capacity: int
) -> dict[str, Tensor]:
    """A store's tensors by name, all zeros: empty slots of a block are read with it.

    Parameters
    ----------
    options : StoreOptions
        Bits of the copies, and the dtype of those in full.
    batch, heads : int
        Sequences and key heads.
    sizes : tuple
        Of a head's keys and of its values.
    capacity : int
        Slots, a multiple of `ROWS`.
    """
    size, value_size = sizes
    rows = batch * heads * capacity
    return {
        "key_codes": torch.zeros(rows * code_bytes(options.key_bits, size), dtype=torch.uint8),
        "key_scales": torch.zeros(rows * group_count(size), dtype=torch.uint16),
        "key_errors": torch.zeros(rows),
        "value_codes": torch.zeros(rows * code_bytes(options.value_bits, value_size), dtype=torch.uint8),
        "value_scales": torch.zeros(rows * group_count(value_size), dtype=torch.uint16),
        "full_keys": torch.zeros(batch, heads, capacity, size, dtype=options.full),
        "full_values": torch.zeros(batch, heads, capacity, value_size, dtype=options.full),
    }


def enlarged(
    tensors: Mapping[str, Tensor], options: StoreOptions, length: int, capacity: int
) -> dict[str, Tensor]:
    """Copies with room for `capacity` slots, of which the first `length` hold what the tensors do."""
    batch, heads, old, size = tensors["full_keys"].shape
    larger = allocate(options, batch, heads, (size, tensors["full_values"].shape[3]), capacity)
    used = whole_blocks(length) // ROWS
    for name, tensor in larger.items():
        # Every layout is [head of a sequence][block of slots][...].
        part = tensors[name].view(batch * heads, old // ROWS, -1)[:, :used]
        tensor.view(batch * heads, capacity // ROWS, -1)[:, :used] = part
    return larger


def by_sequence(tensors: Mapping[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
    """Copies of the tensors for these sequences of the batch, in this order."""
    batch, chosen = tensors["full_keys"].shape[0], {}
    for name, tensor in tensors.items():
        rows = tensor.view(batch, -1).index_select(0, indices)
        chosen[name] = rows.view(len(indices), *tensor.shape[1:]) if tensor.ndim == 4 else rows.flatten()
    return chosen


def check_append(
    options: StoreOptions, keys: Tensor, values: Tensor, tensors: Mapping[str, Tensor] | None
) -> None:
    """Refuse keys and values that a store, whose tensors are given unless it is empty, can't take.

    Raises
    ------
    ValueError
        Shapes that differ from each other's or the store's, or heads that can't be rotated.
    """
    if keys.ndim != 4 or values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must be (batch, key heads, count, size)"
        )
    size = keys.shape[3]
    if options.hadamard and size & (size - 1):
        raise ValueError(f"heads of size {size} can't be rotated: the Hadamard matrix needs a power of two")
    if tensors is None:
        return
    full_keys, full_values = tensors["full_keys"], tensors["full_values"]
    was = (*full_keys.shape[:2], full_keys.shape[3], full_values.shape[3])
    if (*keys.shape[:2], size, values.shape[3]) != was:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} don't fit a cache of batch, heads and "
            f"sizes {was}"
        )
