"""Keys and values of one attention layer: low-bit copies beside full-precision ones, and attention that looks ahead."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlamp.kernels import reference_decoding, reference_lowbit
from torchlamp.kernels.constants import ROWS, AppendFlags
from torchlamp.kernels.dispatch import NativeKernels, NativeObject, as_native, native_for
from torchlamp.kernels.reference_lowbit import code_bytes, group_count

_LEAST = 4 * ROWS
#: Names of the tensors that make up a store, for saving.
TENSORS = ("key_codes", "key_scales", "key_errors", "value_codes", "value_scales", "full_keys", "full_values")


@dataclass(frozen=True)
class StoreOptions:
    """How a store keeps what it is given.

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
    """Keys and values of one layer; made empty, its sizes are those of what is first appended.

    A key or value lies at the place of its append; places are counted from 0. Growing doubles the capacity, so that a
    sequence of n is copied less than 2 n places in all.
    """

    # TENSORS, there from the first append on; docs/decoding.md gives the layouts.
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
        #: (batch * key heads * size) float32, what low-bit keys lack.
        self.mean: Tensor | None = None
        #: Some value isn't finite: values are then read in full precision only.
        self.strange = False
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
        self._check(keys, values)
        count = keys.shape[2]
        if count == 0:
            return
        if self.capacity == 0:
            self._start(keys, values)
        if self.length + count > self.capacity:
            self._grow(self.length + count)
        keys, values = as_native(keys), as_native(values)
        native = native_for(keys, values)
        if native is not None:
            said = self.kernel(native).append(keys, values, self.length, torch.get_num_threads())
        else:
            said = self._append_reference(keys, values)
        self.appended(count, said)

    def appended(self, count: int, said: int) -> None:
        """Count what a kernel has stored behind the last place; `said` is its answer.

        Raises
        ------
        ValueError
            A number that float16 can't hold.
        """
        if said & AppendFlags.OVERFLOW:
            raise ValueError(
                "keys or values above 65504 don't fit a float16 copy: make the cache with full='float32'"
            )
        self.strange = self.strange or bool(said & AppendFlags.NONFINITE_VALUES)
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
        """Attention of the last queries over places `first` to `length`.

        Parameters
        ----------
        q : Tensor
            float32 (batch, heads, queries, size); without a mask the last query sees all places, the one before it all
            but the last, and so on.
        scaling, softcap : float
            Of the scores; softcap 0 is none.
        scores_threshold, values_threshold : float
            Of the weights 2 z (1 - z) r and z; below 0 everything is read in full precision, at infinity nothing.
        mask : Tensor, optional
            bool (batch, queries, length - first), True where a query sees a key.
        first : int
            Places before aren't seen.
        sinks : Tensor, optional
            float32 (heads,) logits that enter the normaliser alone.
        """
        batch, heads, queries, _ = q.shape
        if self.length == first:
            output = q.new_zeros(batch, queries, heads, q.shape[-1])
            return Attended(output, 0, 0, 0, 0)
        kv_heads, value_size = self.full_values.shape[1], self.full_values.shape[3]
        native = native_for(q)
        if native is None:
            return self._attend_reference(
                q, scaling, scores_threshold, values_threshold, mask, first, softcap, sinks
            )
        output = q.new_empty(batch, queries, heads, value_size)
        recomputed = torch.empty(batch, heads, queries, dtype=torch.int32)
        full_rows = torch.empty(batch, kv_heads, queries, dtype=torch.int32)
        visible = torch.empty(batch, queries, dtype=torch.int32)
        self.kernel(native).attend(
            as_native(q), output, recomputed, full_rows, visible, first, self.length,
            None if mask is None else as_native(mask.expand(batch, -1, -1), "all"), queries > 1, sinks,
            scaling, softcap, scores_threshold, values_threshold, self.strange, torch.get_num_threads(),
        )  # fmt: skip
        seen = int(visible.sum())
        return Attended(output, int(recomputed.sum()), seen * heads, int(full_rows.sum()), seen * kv_heads)

    def crop(self, length: int) -> None:
        """Forget places from `length` on."""
        self.length = min(self.length, length)
        if self.length == 0:
            self.clear()

    def drop_first(self, count: int) -> None:
        """Forget the first places; those behind move to the front."""
        if count <= 0:
            return
        kept = slice(count, self.length)
        # Copies: what is read here is written over.
        keys = self.full_keys[:, :, kept].to(torch.float32, copy=True)
        values = self.full_values[:, :, kept].to(torch.float32, copy=True)
        mean, strange = self.mean, self.strange
        self.length = 0
        if keys.shape[2]:
            self.append(keys, values)
        self.mean, self.strange = mean, strange and self.strange

    def select(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order; an index may be repeated."""
        if self.capacity == 0:
            return
        batch, chosen = self.full_keys.shape[0], {}
        for name in TENSORS:
            tensor = getattr(self, name)
            by_batch = tensor.view(batch, -1).index_select(0, indices)
            chosen[name] = (
                by_batch.view(len(indices), *tensor.shape[1:]) if tensor.ndim == 4 else by_batch.flatten()
            )
        if self.mean is not None:
            self.mean = self.mean.view(batch, -1).index_select(0, indices).flatten()
        self._take(chosen)

    def clear(self) -> None:
        """Forget everything, sizes included."""
        self.length = self.capacity = 0
        self.mean, self.strange = None, False
        self._native.forget()
        for name in TENSORS:
            vars(self).pop(name, None)

    @property
    def bytes(self) -> tuple[int, int]:
        """Memory of the low-bit copies and of the full-precision ones, for the whole capacity."""
        if self.capacity == 0:
            return 0, 0
        sizes = [getattr(self, name).numel() * getattr(self, name).element_size() for name in TENSORS]
        return sum(sizes[:5]), sum(sizes[5:])

    def state(self) -> dict[str, Tensor]:
        """Tensors that `restore` takes; nothing for an empty store."""
        if self.capacity == 0:
            return {}
        found = {name: getattr(self, name) for name in TENSORS}
        found["counts"] = torch.tensor([self.length, self.capacity, int(self.strange)])
        return found if self.mean is None else {**found, "mean": self.mean}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Become what `state` was of."""
        own = {name: state[name].clone() for name in TENSORS if state}
        self.clear()
        if not state:
            return
        self._take(own)
        self.length, self.capacity, strange = (int(n) for n in state["counts"])
        self.strange, self.mean = bool(strange), state.get("mean")

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.ndim != 4 or values.shape[:3] != keys.shape[:3]:
            raise ValueError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must be (batch, key heads, count, size)"
            )
        size = keys.shape[3]
        if self.options.hadamard and size & (size - 1):
            raise ValueError(
                f"heads of size {size} can't be rotated: the Hadamard matrix needs a power of two"
            )
        if self.capacity == 0:
            return
        was = (*self.full_keys.shape[:2], self.full_keys.shape[3], self.full_values.shape[3])
        if (*keys.shape[:2], size, values.shape[3]) != was:
            raise ValueError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} don't fit a cache of batch, heads and "
                f"sizes {was}"
            )

    def _start(self, keys: Tensor, values: Tensor) -> None:
        capacity = -(-max(keys.shape[2], _LEAST) // ROWS) * ROWS
        mean = self.mean
        if self.options.center and mean is None:
            mean = keys.mean(2)
            # A mean that isn't finite would take all keys along.
            mean = torch.where(mean.isfinite(), mean, 0).flatten()
        self._take(self._allocate(keys.shape, values.shape[3], capacity))
        self.capacity, self.mean = capacity, mean

    def _allocate(self, shape: torch.Size, value_size: int, capacity: int) -> dict[str, Tensor]:
        batch, heads, _, size = shape
        rows, options = batch * heads * capacity, self.options
        # Zeros: places that nothing was put in are read with their block.
        return {
            "key_codes": torch.zeros(rows * code_bytes(options.key_bits, size), dtype=torch.uint8),
            "key_scales": torch.zeros(rows * group_count(size), dtype=torch.uint16),
            "key_errors": torch.zeros(rows),
            "value_codes": torch.zeros(rows * code_bytes(options.value_bits, value_size), dtype=torch.uint8),
            "value_scales": torch.zeros(rows * group_count(value_size), dtype=torch.uint16),
            "full_keys": torch.zeros(batch, heads, capacity, size, dtype=options.full),
            "full_values": torch.zeros(batch, heads, capacity, value_size, dtype=options.full),
        }

    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Use new tensors, all of which there was memory for: until then the store stays what it was."""
        vars(self).update(tensors)
        self._native.forget()

    def _grow(self, needed: int) -> None:
        old, used = self.capacity, -(-self.length // ROWS) * ROWS
        batch, heads, _, size = self.full_keys.shape
        capacity = -(-max(needed, 2 * old) // ROWS) * ROWS
        larger = self._allocate(torch.Size((batch, heads, 0, size)), self.full_values.shape[3], capacity)
        for name, tensor in larger.items():
            # All layouts are heads times places, whole blocks together.
            part = getattr(self, name).view(batch * heads, old // ROWS, -1)[:, : used // ROWS]
            tensor.view(batch * heads, capacity // ROWS, -1)[:, : used // ROWS] = part
        self._take(larger)
        self.capacity = capacity

    def kernel(self, native: NativeKernels) -> Any:
        """The native object over the tensors."""
        return self._native.get(native, self._make)

    def _make(self, native: NativeKernels) -> Any:
        return native.extension.KeyValueStore(
            native.instruction_set, self.key_codes, self.key_scales, self.key_errors, self.value_codes,
            self.value_scales, self.full_keys, self.full_values, self.mean, self.options.key_bits,
            self.options.value_bits, self.options.hadamard,
        )  # fmt: skip

    def _append_reference(self, keys: Tensor, values: Tensor) -> int:
        batch, heads, count, size = keys.shape
        places, limit = slice(self.length, self.length + count), torch.finfo(self.options.full).max
        self.full_keys[:, :, places], self.full_values[:, :, places] = keys, values
        both = torch.cat([keys.flatten(), values.flatten()])
        overflow = bool(((both.abs() > limit) & both.isfinite()).any())
        moved = keys if self.mean is None else keys - self.mean.view(batch, heads, 1, size)
        if self.options.hadamard:
            moved = reference_decoding.hadamard(moved)
        # Values lie in pairs of rows and their scales in blocks: those that are there already keep their part.
        first, last = self.length // ROWS, -(-(self.length + count) // ROWS)
        value_codes = self.value_codes.view(batch * heads, self.capacity // 2, -1)[:, 8 * first : 8 * last]
        value_scales = self.value_scales.view(batch * heads, self.capacity // ROWS, -1)[:, first:last]
        to, source = torch.arange(self.length, self.length + count), torch.arange(count)
        for head in range(batch * heads):
            packed = reference_lowbit.pack_blocks(moved.reshape(-1, count, size)[head], self.options.key_bits)
            # Sixteen rows lie interleaved: a row is a lane of its block.
            mine = (self.key_codes, self.key_scales.view(torch.int16), self.key_errors)
            news = (packed[0], packed[1].view(torch.int16), packed[2])  # torch indexes no uint16
            for whole, new in zip(mine, news, strict=True):
                inner = whole.numel() // (batch * heads * self.capacity)
                lanes = max(1, 16 * self.options.key_bits // 8 // 8) if whole is mine[0] else 1
                shape = (-1, inner // lanes, ROWS, lanes)
                own = whole.view(batch * heads, -1)[head].view(shape)
                own[to // ROWS, :, to % ROWS] = new.view(shape)[source // ROWS, :, source % ROWS]
            errors = self.key_errors.view(batch * heads, -1)[head, places]
            errors[~errors.isfinite()] = torch.nan
            bits = self.options.value_bits
            integers, patterns = reference_lowbit.split_pairs(value_codes[head], value_scales[head], bits)
            rows = values.reshape(-1, count, values.shape[3])[head]
            integers[to - ROWS * first], patterns[to - ROWS * first] = reference_lowbit.quantise_rows(
                rows, bits
            )
            value_codes[head], value_scales[head] = reference_lowbit.join_pairs(integers, patterns, bits)
        flags = AppendFlags.OVERFLOW if overflow else AppendFlags(0)
        return flags if values.isfinite().all() else flags | AppendFlags.NONFINITE_VALUES

    def _low_keys(self) -> Tensor:
        """What the low-bit keys stand for: (batch * heads, capacity, size)."""
        batch, heads, _, size = self.full_keys.shape
        rows = batch * heads * self.capacity
        return reference_lowbit.unpack_blocks(
            self.key_codes, self.key_scales, self.options.key_bits, rows, size
        ).view(batch * heads, self.capacity, size)

    def _attend_reference(
        self,
        q: Tensor,
        scaling: float,
        scores_threshold: float,
        values_threshold: float,
        mask: Tensor | None,
        first: int,
        softcap: float,
        sinks: Tensor | None,
    ) -> Attended:
        batch, heads, queries, size = q.shape
        kv_heads, value_size = self.full_values.shape[1], self.full_values.shape[3]
        places = slice(first, self.length)
        if mask is None:
            mask = torch.ones(queries, self.length - first, dtype=torch.bool).tril(
                self.length - first - queries
            )
        seen = mask.expand(batch, queries, -1)
        values = reference_lowbit.unpack_pairs(
            self.value_codes.view(batch * kv_heads * self.capacity // 2, -1),
            self.value_scales.view(batch * kv_heads * self.capacity // ROWS, -1),
            self.options.value_bits,
            value_size,
        ).view(batch, kv_heads, self.capacity, value_size)
        output, recomputed, full_rows = reference_decoding.attend(
            q,
            self._low_keys().view(batch, kv_heads, self.capacity, size)[:, :, places],
            self.key_errors.view(batch, kv_heads, self.capacity)[:, :, places],
            values[:, :, places],
            self.full_keys[:, :, places].float(),
            self.full_values[:, :, places].float(),
            mean=None if self.mean is None else self.mean.view(batch, kv_heads, size),
            rotated=self.options.hadamard,
            seen=seen,
            sinks=sinks,
            scaling=scaling,
            softcap=softcap,
            scores_threshold=scores_threshold,
            values_threshold=-1.0 if self.strange else values_threshold,
        )
        count = int(seen.sum())
        return Attended(output, int(recomputed.sum()), count * heads, int(full_rows.sum()), count * kv_heads)

    def __getstate__(self) -> dict[str, Any]:
        # torch pickles no uint16.
        scales = {n: t.view(torch.int16) for n, t in vars(self).items() if n.endswith("_scales")}
        return {**vars(self), **scales, "_native": NativeObject()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for name in [name for name in state if name.endswith("_scales")]:
            setattr(self, name, state[name].view(torch.uint16))
