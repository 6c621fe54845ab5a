"""One attention layer's keys and values over time: a low-bit and a full-precision copy that grow, shrink and attend."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlamp.kernels.decode import KeyValueArrays
from torchlamp.kernels.decode_types import Attended, StoreFormat, Thresholds

#: Positions that a new store has room for beyond its first keys.
ROOM = 256


class LookaheadStore:
    """Keys and values of one layer, positions `first` ... `last` - 1, every position kept twice.

    Memory doubles when it runs out, so a store of n positions has copied fewer than 2 n. What `keep_last` gives up
    stays in place until its room is needed; then the rest moves to the front, at most once per half a capacity.

    Parameters
    ----------
    form : StoreFormat
        How numbers are kept.
    """

    def __init__(self, form: StoreFormat | None = None) -> None:
        self.form = StoreFormat() if form is None else form
        self.arrays: KeyValueArrays | None = None
        self.first = self.last = 0
        #: Whether a value was infinite or NaN: from then on all values are read in full precision.
        self.strange = False

    def __len__(self) -> int:
        return self.last - self.first

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add positions behind the last one.

        Parameters
        ----------
        keys, values
            (batch, key heads, positions, size) and (batch, key heads, positions, value size), any float dtype.

        Raises
        ------
        ValueError
            A shape that doesn't fit what is there, or with `full="float16"` a number beyond 65504.
        """
        if keys.dtype != torch.float32 or values.dtype != torch.float32:
            keys, values = keys.float(), values.float()
        arrays = self._room(keys, values)
        overflow, strange = arrays.append(keys, values, self.last)
        if overflow:
            raise ValueError(
                "full='float16' can't keep a key or value beyond 65504: choose full='int16' or 'float32'"
            )
        self.strange = self.strange or strange
        self.last += keys.shape[2]

    def attend(
        self,
        query: Tensor,
        *,
        thresholds: Thresholds,
        scaling: float,
        first: int | None = None,
        last: int | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        sinks: Tensor | None = None,
        softcap: float = 0.0,
    ) -> Attended:
        """Attention of queries over the positions `first` ... `last` - 1, all by default.

        See `torchlamp.kernels.decode.KeyValueArrays.attend`. Raises ValueError where shapes don't fit or nothing was
        ever appended.
        """
        if self.arrays is None:
            raise ValueError("an empty store has no sizes yet: append keys and values before attending")
        first = self.first if first is None else first
        last = self.last if last is None else last
        self._check(query, mask, last - first)
        return self.arrays.attend(
            query,
            first=first,
            last=last,
            thresholds=thresholds,
            scaling=scaling,
            mask=mask,
            causal=causal,
            sinks=sinks,
            softcap=softcap,
            strange=self.strange,
        )

    def full(self, first: int | None = None, last: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the full copies in float32, (batch, key heads, positions, size), all by default."""
        if self.arrays is None:
            raise ValueError("an empty store has no sizes yet: append keys and values before reading them")
        return self.arrays.full(self.first if first is None else first, self.last if last is None else last)

    def crop(self, positions: int) -> None:
        """Forget the last `positions` positions."""
        if not 0 <= positions <= len(self):
            raise ValueError(f"{positions} positions to remove: the store has {len(self)}")
        self.last -= positions

    def keep_last(self, positions: int) -> None:
        """Forget all but the last `positions` positions."""
        self.first = max(self.first, self.last - positions)

    def clear(self) -> None:
        """Forget everything, sizes too, and give the memory back."""
        self.arrays, self.first, self.last, self.strange = None, 0, 0, False

    def select(self, indices: Tensor) -> None:
        """Keep these samples of the batch, in this order; any may come more than once."""
        if self.arrays is None:
            return
        chosen = indices.to(self.arrays.full_keys.device)
        same = torch.arange(self.arrays.full_keys.shape[0], device=chosen.device)
        if chosen.dtype == torch.bool or not torch.equal(chosen, same):
            tensors = {name: t[chosen] for name, t in self.arrays.tensors().items()}
            self.arrays = self.arrays.replaced(tensors)

    def repeat(self, times: int) -> None:
        """Every sample of the batch `times` times, one after the other."""
        if self.arrays is not None:
            batch = torch.arange(self.arrays.full_keys.shape[0])
            self.select(batch.repeat_interleave(times))

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the low-bit and of the full-precision copies, room for growth included."""
        sizes = {"low": 0, "full": 0}
        for name, t in ({} if self.arrays is None else self.arrays.tensors()).items():
            sizes["full" if name.startswith("full") else "low"] += t.numel() * t.element_size()
        return sizes

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of a store that has any, cut to the positions in use, and `span`: first, last, strange."""
        if self.arrays is None:
            return {}
        shift = self.first // 16 * 16
        tensors = _moved(self.arrays, self.last - shift, shift, self.last).tensors()
        span = torch.tensor([self.first - shift, self.last - shift, int(self.strange)])
        return {**tensors, "span": span}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` of a store of the same format gave.

        Raises
        ------
        ValueError
            Tensors of another format.
        """
        self.clear()
        if not state:
            return
        given = {name: t.clone() for name, t in state.items() if name != "span"}
        shape, value_size = given["full_keys"].shape, given["full_values"].shape[3]
        wanted = KeyValueArrays.empty(
            self.form, (shape[0], shape[1], shape[2]), (shape[3], value_size), given["full_keys"].device
        )
        for name, t in {**wanted.tensors(), **given}.items():
            own = wanted.tensors().get(name)
            if own is None or name not in given or (own.dtype, own.shape) != (t.dtype, t.shape):
                raise ValueError(
                    f"saved tensor {name!r} doesn't fit a store of {self.form}: "
                    "load it with the format it was saved with"
                )
        self.arrays = wanted.replaced(given)
        self.first, self.last, strange = (int(x) for x in state["span"])
        self.strange = bool(strange)

    def _room(self, keys: Tensor, values: Tensor) -> KeyValueArrays:
        """Arrays with room for new positions."""
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)}: both must be "
                "(batch, key heads, positions, size)"
            )
        count = keys.shape[2]
        if self.arrays is None:
            shape = (keys.shape[0], keys.shape[1], count + ROOM)
            arrays = KeyValueArrays.empty(self.form, shape, (keys.shape[3], values.shape[3]), keys.device)
            self.arrays = arrays
        arrays = self.arrays
        batch, heads, _, size = arrays.full_keys.shape
        value_size = arrays.full_values.shape[3]
        if keys.shape != (batch, heads, count, size) or values.shape[3] != value_size:
            raise ValueError(
                f"new keys {tuple(keys.shape)} and values {tuple(values.shape)} don't fit a store of batch {batch}, "
                f"{heads} key heads and sizes {size} and {value_size}"
            )
        if self.last == 0 and count and arrays.mean is not None:
            mean = keys.detach().mean(2)
            arrays.mean.copy_(torch.where(mean.isfinite(), mean, 0.0))
        if self.last + count > arrays.capacity:
            shift = self.first // 16 * 16  # whole blocks move
            kept = self.last - shift + count
            capacity = arrays.capacity if 2 * kept <= arrays.capacity else max(2 * arrays.capacity, kept)
            arrays = self.arrays = _moved(arrays, capacity, shift, self.last)
            self.first, self.last = self.first - shift, self.last - shift
        return arrays

    def _check(self, query: Tensor, mask: Tensor | None, keys: int) -> None:
        assert self.arrays is not None
        own = self.arrays.full_keys.shape
        if (
            query.dim() != 4
            or query.shape[0] != own[0]
            or query.shape[3] != own[3]
            or query.shape[1] % own[1]
            or not query.shape[1]
        ):
            raise ValueError(
                f"queries {tuple(query.shape)} don't fit a store of batch {own[0]}, {own[1]} key heads "
                f"and size {own[3]}"
            )
        if mask is not None and mask.shape != (own[0], query.shape[2], keys):
            raise ValueError(
                f"mask {tuple(mask.shape)}: it must be (batch, queries, keys) = {(own[0], query.shape[2], keys)}"
            )


def _moved(arrays: KeyValueArrays, capacity: int, shift: int, last: int) -> KeyValueArrays:
    """Arrays of another capacity that hold positions shift ... last - 1 from their start; `shift` is whole blocks."""
    shape = arrays.full_keys.shape
    sizes = (shape[3], arrays.full_values.shape[3])
    fresh = KeyValueArrays.empty(arrays.form, (shape[0], shape[1], capacity), sizes, arrays.full_keys.device)
    old = arrays.tensors()
    for name, to in fresh.tensors().items():
        if name == "mean":
            to.copy_(old[name])
            continue
        rows = 16 if name in ("key_codes", "key_scales") else 1
        part = old[name][:, :, shift // rows : -(-last // rows)]
        to[:, :, : part.shape[2]] = part
    return fresh
