"""The readable reference of a key-value store: new keys and values into its tensors, and attention over these.

`native/lowbit/append.hpp` and `native/lowbit/attend.hpp` are the kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels import reference_decoding, reference_lowbit
from torchlamp.kernels.constants import ROWS, AppendFlags


@dataclass(frozen=True, eq=False)
class StoreReference:
    """The tensors of a store for `batch` sequences with `heads` key heads and room for `capacity` slots.

    Attributes
    ----------
    key_codes, key_scales, key_errors : Tensor
        Keys in blocks of slots (`reference_lowbit`), head after head: less `mean`, and rotated if `hadamard` says so.
    value_codes, value_scales : Tensor
        Values in pairs of slots, head after head.
    full_keys, full_values : Tensor
        float16 or float32 (batch, heads, capacity, size).
    mean : Tensor, optional
        float32 (batch * heads * size,).
    key_bits, value_bits : int
        4 or 8.
    hadamard : bool
        Whether low-bit keys are rotated.
    """

    key_codes: Tensor
    key_scales: Tensor
    key_errors: Tensor
    value_codes: Tensor
    value_scales: Tensor
    full_keys: Tensor
    full_values: Tensor
    mean: Tensor | None
    key_bits: int
    value_bits: int
    hadamard: bool

    def append(self, keys: Tensor, values: Tensor, start: int) -> AppendFlags:
        """Store float32 keys and values (batch, heads, count, size) in the slots from `start` on."""
        slots = slice(start, start + keys.shape[2])
        self.full_keys[:, :, slots], self.full_values[:, :, slots] = keys, values
        self._append_keys(keys, start)
        self._append_values(values, start)
        both = torch.cat([keys.flatten(), values.flatten()])
        limit = torch.finfo(self.full_keys.dtype).max
        overflow = bool(((both.abs() > limit) & both.isfinite()).any())
        flags = AppendFlags.OVERFLOW if overflow else AppendFlags(0)
        return flags if values.isfinite().all() else flags | AppendFlags.NONFINITE_VALUES

    def _append_keys(self, keys: Tensor, start: int) -> None:
        batch, heads, count, size = keys.shape
        moved = keys if self.mean is None else keys - self.mean.view(batch, heads, 1, size)
        if self.hadamard:
            moved = reference_decoding.hadamard(moved)
        to, source = torch.arange(start, start + count), torch.arange(count)
        # Sixteen rows lie interleaved, each a lane of its block; torch indexes no uint16.
        code_lanes = max(1, self.key_bits // 4)
        targets = ((self.key_codes, code_lanes), (self.key_scales.view(torch.int16), 1), (self.key_errors, 1))
        for head, rows in enumerate(moved.reshape(-1, count, size)):
            codes, scales, errors = reference_lowbit.pack_blocks(rows, self.key_bits)
            for (whole, lanes), new in zip(targets, (codes, scales.view(torch.int16), errors), strict=True):
                shape = (-1, whole.numel() // self.key_errors.numel() // lanes, ROWS, lanes)
                own = whole.view(batch * heads, -1)[head].view(shape)
                own[to // ROWS, :, to % ROWS] = new.view(shape)[source // ROWS, :, source % ROWS]
            stored = self.key_errors.view(batch * heads, -1)[head, start : start + count]
            stored[~stored.isfinite()] = torch.nan

    def _append_values(self, values: Tensor, start: int) -> None:
        batch, heads, count, size = values.shape
        # Values lie in pairs of rows and their scales in blocks: those that are there already keep their part.
        first, last = start // ROWS, -(-(start + count) // ROWS)
        codes, scales = self._value_heads()
        codes = codes[:, ROWS // 2 * first : ROWS // 2 * last]
        scales = scales[:, first:last]
        own = torch.arange(start, start + count) - ROWS * first
        for head, rows in enumerate(values.reshape(batch * heads, count, size)):
            integers, patterns = reference_lowbit.split_pairs(codes[head], scales[head], self.value_bits)
            integers[own], patterns[own] = reference_lowbit.quantise_rows(rows, self.value_bits)
            codes[head], scales[head] = reference_lowbit.join_pairs(integers, patterns, self.value_bits)

    def _value_heads(self) -> tuple[Tensor, Tensor]:
        """Codes (batch * heads, pairs of slots, bytes) and scales (batch * heads, blocks, bytes) of the values."""
        batch, heads, capacity, _ = self.full_values.shape
        codes = self.value_codes.view(batch * heads, capacity // 2, -1)
        return codes, self.value_scales.view(batch * heads, capacity // ROWS, -1)

    def low_keys(self) -> Tensor:
        """The numbers that low-bit keys stand for, float32 (batch, heads, capacity, size)."""
        rows, size = self.key_errors.numel(), self.full_keys.shape[3]
        found = reference_lowbit.unpack_blocks(self.key_codes, self.key_scales, self.key_bits, rows, size)
        return found.view(self.full_keys.shape)

    def low_values(self) -> Tensor:
        """The numbers that low-bit values stand for, float32 (batch, heads, capacity, size)."""
        codes, scales = self._value_heads()
        size = self.full_values.shape[3]
        found = reference_lowbit.unpack_pairs(
            codes.flatten(0, 1), scales.flatten(0, 1), self.value_bits, size
        )
        return found.view(self.full_values.shape)

    def attend(
        self,
        q: Tensor,
        slots: slice,
        mask: Tensor | None,
        sinks: Tensor | None,
        scaling: float,
        softcap: float,
        scores_threshold: float,
        values_threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """`reference_decoding.attend` over some slots.

        The mask is bool (batch or 1, queries, slots); without one the last query sees all slots, the one before it all
        but the last, and so on. Returns its results, and the number of pairs of a query and a key that it sees.
        """
        batch, heads, capacity, size = self.full_keys.shape
        queries, count = q.shape[2], slots.stop - slots.start
        if mask is None:
            mask = torch.ones(queries, count, dtype=torch.bool).tril(count - queries)
        seen = mask.expand(batch, queries, -1)
        output, recomputed, full_rows = reference_decoding.attend(
            q,
            self.low_keys()[:, :, slots],
            self.key_errors.view(batch, heads, capacity)[:, :, slots],
            self.low_values()[:, :, slots],
            self.full_keys[:, :, slots].float(),
            self.full_values[:, :, slots].float(),
            mean=None if self.mean is None else self.mean.view(batch, heads, size),
            rotated=self.hadamard,
            seen=seen,
            sinks=sinks,
            scaling=scaling,
            softcap=softcap,
            scores_threshold=scores_threshold,
            values_threshold=values_threshold,
        )
        return output, recomputed, full_rows, int(seen.sum())
