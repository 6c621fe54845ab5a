"""Keys and values of one attention layer: low-bit copies beside full-precision ones, and attention that looks ahead."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlamp.decoding.store_tensors import (
    TENSORS,
    StoreOptions,
    allocate,
    by_sequence,
    check_append,
    enlarged,
    whole_blocks,
)
from torchlamp.kernels.constants import ROWS, AppendFlags
from torchlamp.kernels.dispatch import NativeKernels, NativeObject, as_native, native_for
from torchlamp.kernels.reference_store import StoreReference

__all__ = ["TENSORS", "Attended", "KeyValueStore", "StoreOptions"]
#: The slots that a store begins with.
_MIN_CAPACITY = 4 * ROWS
#: Slots from which on a store grows by a half: memory that isn't used is a third of it at most.
_LARGE = 512


@dataclass(frozen=True)
class Attended:
    """Output float32 (batch, queries, heads, value size), and counts over the call."""

    output: Tensor
    #: Scores recomputed, of (query head, key) pairs seen.
    recomputed: int
    eligible: int
    #: Values read in full precision, of (key head, key) pairs seen.
    full_values: int
    eligible_values: int


class KeyValueStore:
    """Keys and values of one layer; made empty, its sizes are those of the first append.

    Keys and values lie in slots, in the order of their appends, counted from 0. Growing doubles the capacity, and from
    512 slots on adds a half, so that a sequence of n is copied less than 3 n slots in all.
    """

    # TENSORS, there from the first append on.
    key_codes: Tensor
    key_scales: Tensor
    key_errors: Tensor
    value_codes: Tensor
    value_scales: Tensor
    full_keys: Tensor
    full_values: Tensor

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        self.length = 0
        self.capacity = 0
        #: float32 (batch * key heads * size,), subtracted from keys before they are quantised.
        self.mean: Tensor | None = None
        #: Some value isn't finite: values are then read in full precision only.
        self.has_nonfinite_values = False
        self._native = NativeObject()

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new keys and values.

        Parameters
        ----------
        keys, values : Tensor
            float32 (batch, key heads, count, size) on the CPU; their sizes may differ.

        Raises
        ------
        ValueError
            Other shapes than before, a head size that can't be rotated, or numbers that float16 can't hold.
        TypeError
            Not float32.
        """
        if keys.dtype != torch.float32 or values.dtype != torch.float32:
            raise TypeError(f"keys and values must be float32, got {keys.dtype} and {values.dtype}")
        check_append(self.options, keys, values, self._tensors() if self.capacity else None)
        count = keys.shape[2]
        if count == 0:
            return
        if self.capacity == 0:
            self._start(keys, values)
        self.reserve(count)
        keys, values = as_native(keys), as_native(values)
        native = native_for(keys, values)
        if native is not None:
            flags = self.kernel(native).append(keys, values, self.length, torch.get_num_threads())
        else:
            flags = self._reference().append(keys, values, self.length)
        self.appended(count, flags)

    def reserve(self, count: int) -> None:
        """Have memory for so many keys and values more, in a store that isn't empty."""
        if self.length + count > self.capacity:
            more = self.capacity if self.capacity < _LARGE else self.capacity // 2
            capacity = whole_blocks(max(self.length + count, self.capacity + more))
            self._take(enlarged(self._tensors(), self.options, self.length, capacity))
            self.capacity = capacity

    def appended(self, count: int, flags: int) -> None:
        """Count keys and values that a kernel has stored after the last slot; `flags` are its `AppendFlags`.

        Raises
        ------
        ValueError
            A number that float16 can't hold.
        """
        if flags & AppendFlags.OVERFLOW:
            raise ValueError(
                "keys or values above 65504 don't fit a float16 copy: make the cache with full='float32'"
            )
        self.has_nonfinite_values = self.has_nonfinite_values or bool(flags & AppendFlags.NONFINITE_VALUES)
        self.length += count

    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        *,
        scaling: float,
        scores_threshold: float,
        values_threshold: float,
        mask: Tensor | None = None,
        first: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Attended:
        """Attention of the last queries over the slots `first` to `length`.

        Parameters
        ----------
        q : Tensor
            float32 (batch, heads, queries, size); without a mask the last query sees all keys, the one before it all
            but the last, and so on.
        scaling, softcap : float
            Of the scores; softcap 0 is none.
        scores_threshold, values_threshold : float
            Of the weights 2 z (1 - z) r and z; below 0 everything is read in full precision, at infinity nothing.
        mask : Tensor, optional
            bool (batch, queries, length - first), True where a query sees a key, whatever their order.
        first : int
            Keys of the slots before aren't seen.
        sinks : Tensor, optional
            float32 (heads,) logits that enter the normaliser alone.
        """
        batch, heads, queries, size = q.shape
        if self.length == first:
            return Attended(q.new_zeros(batch, queries, heads, size), 0, 0, 0, 0)
        told = (scaling, softcap, scores_threshold, values_threshold)
        native = native_for(q)
        if native is None:
            if self.has_nonfinite_values:
                told = (scaling, softcap, scores_threshold, -1.0)
            output, recomputed, full_rows, pairs = self._reference().attend(
                q, slice(first, self.length), mask, sinks, *told
            )
        else:
            output, recomputed, full_rows, pairs = self._attend(native, q, mask, first, sinks, *told)
        kv_heads = self.full_values.shape[1]
        return Attended(output, int(recomputed.sum()), pairs * heads, int(full_rows.sum()), pairs * kv_heads)

    def _attend(
        self,
        native: NativeKernels,
        q: Tensor,
        mask: Tensor | None,
        first: int,
        sinks: Tensor | None,
        *told: float,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """`StoreReference.attend`, natively."""
        batch, heads, queries, _ = q.shape
        kv_heads, value_size = self.full_values.shape[1], self.full_values.shape[3]
        output = q.new_empty(batch, queries, heads, value_size)
        recomputed = torch.empty(batch, heads, queries, dtype=torch.int32)
        full_rows = torch.empty(batch, kv_heads, queries, dtype=torch.int32)
        visible = torch.empty(batch, queries, dtype=torch.int32)
        rows = None if mask is None else as_native(mask.expand(batch, -1, -1), "all")
        self.kernel(native).attend(
            as_native(q), output, recomputed, full_rows, visible, first, self.length, rows,
            queries > 1 and rows is None, sinks,
            *told, self.has_nonfinite_values, torch.get_num_threads(),
        )  # fmt: skip
        return output, recomputed, full_rows, int(visible.sum())

    def crop(self, length: int) -> None:
        """Forget the slots from `length` on."""
        self.length = min(self.length, length)
        if self.length == 0:
            self.clear()

    def drop_first(self, count: int) -> None:
        """Forget the first slots; the others move to the front."""
        if count <= 0:
            return
        kept = slice(count, self.length)
        # Copies: the slots that are read here are written over.
        keys = self.full_keys[:, :, kept].to(torch.float32, copy=True)
        values = self.full_values[:, :, kept].to(torch.float32, copy=True)
        mean, before = self.mean, self.has_nonfinite_values
        self.length = 0
        if keys.shape[2]:
            self.append(keys, values)
        self.mean, self.has_nonfinite_values = mean, before and self.has_nonfinite_values

    def select(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order; an index may be repeated."""
        if self.capacity == 0:
            return
        batch = self.full_keys.shape[0]
        chosen = by_sequence(self._tensors(), indices)
        if self.mean is not None:
            self.mean = self.mean.view(batch, -1).index_select(0, indices).flatten()
        self._take(chosen)

    def clear(self) -> None:
        """Forget everything, sizes included."""
        self.length = self.capacity = 0
        self.mean, self.has_nonfinite_values = None, False
        self._native.forget()
        for name in TENSORS:
            vars(self).pop(name, None)

    @property
    def bytes(self) -> tuple[int, int]:
        """Memory of the low-bit copies and of the full-precision ones, for the whole capacity."""
        if self.capacity == 0:
            return 0, 0
        sizes = [tensor.numel() * tensor.element_size() for tensor in self._tensors().values()]
        return sum(sizes[:5]), sum(sizes[5:])

    def state(self) -> dict[str, Tensor]:
        """Tensors that `restore` takes; nothing for an empty store."""
        if self.capacity == 0:
            return {}
        counts = torch.tensor([self.length, self.capacity, int(self.has_nonfinite_values)])
        mean = {} if self.mean is None else {"mean": self.mean}
        return {**self._tensors(), "counts": counts, **mean}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take copies of the tensors that another store's `state` gave, in the place of this one's contents."""
        own = {name: state[name].clone() for name in TENSORS if state}
        self.clear()
        if not state:
            return
        self._take(own)
        self.length, self.capacity, nonfinite = (int(n) for n in state["counts"])
        self.has_nonfinite_values, self.mean = bool(nonfinite), state.get("mean")

    def kernel(self, native: NativeKernels) -> Any:
        """The native object over the tensors."""
        return self._native.get(
            native,
            lambda kernels: kernels.extension.KeyValueStore(kernels.instruction_set, *self._contents()),
        )

    def _reference(self) -> StoreReference:
        return StoreReference(*self._contents())

    def _contents(self) -> tuple[Any, ...]:
        """Everything that kernel and reference are made of."""
        options = self.options
        return *self._tensors().values(), self.mean, options.key_bits, options.value_bits, options.hadamard

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}

    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors in the place of the store's; where making them failed, the store stays as it was."""
        vars(self).update(tensors)
        self._native.forget()

    def _start(self, keys: Tensor, values: Tensor) -> None:
        batch, heads, count, size = keys.shape
        capacity = whole_blocks(max(count, _MIN_CAPACITY))
        mean = self.mean
        if self.options.center and mean is None:
            mean = keys.mean(2)
            # A mean that isn't finite would take all keys along.
            mean = torch.where(mean.isfinite(), mean, 0).flatten()
        self._take(allocate(self.options, batch, heads, (size, values.shape[3]), capacity))
        self.capacity, self.mean = capacity, mean

    def __getstate__(self) -> dict[str, Any]:
        # torch pickles no uint16.
        scales = {n: t.view(torch.int16) for n, t in vars(self).items() if n.endswith("_scales")}
        return {**vars(self), **scales, "_native": NativeObject()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for name in [name for name in state if name.endswith("_scales")]:
            setattr(self, name, state[name].view(torch.uint16))
