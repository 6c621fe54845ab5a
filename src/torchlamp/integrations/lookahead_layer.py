"""One layer of a `LookaheadCache`: what transformers asks of a cache layer, over a `LookaheadStore`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from torchlamp.compositions.lookahead_store import LookaheadStore
from torchlamp.kernels.decode_types import StoreFormat, Thresholds


@dataclass
class DecodeCounts:
    """What attention over a store met: scores and values that a query saw, and how many were full precision."""

    scores: int = 0
    recomputed: int = 0
    #: A value is counted once for all query heads that share it.
    values: int = 0
    read_in_full: int = 0

    def add(self, totals: tuple[int, int, int, int]) -> None:
        """Add the totals of one `Attended`."""
        self.recomputed += totals[0]
        self.scores += totals[1]
        self.read_in_full += totals[2]
        self.values += totals[3]

    @property
    def recompute_rate(self) -> float:
        """Share of scores that were recomputed; 0 where there were none."""
        return self.recomputed / self.scores if self.scores else 0.0

    @property
    def full_value_rate(self) -> float:
        """Share of values that were read in full precision; 0 where there were none."""
        return self.read_in_full / self.values if self.values else 0.0


class View(NamedTuple):
    """What the keys and values that `update` returns stand for, in their attribute `lookahead`."""

    layer: "LookaheadLayer"
    first: int
    last: int

    def full(self) -> tuple[Tensor, Tensor]:
        """The keys and values themselves, in float32."""
        return self.layer.store.full(self.first, self.last)


class LookaheadLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer that sees every position.

    Parameters
    ----------
    form, thresholds
        How numbers are kept, and what is recomputed.
    decoding
        Says whether the model attends with "lamp-decode", which needs no keys but their store.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self, form: StoreFormat, thresholds: Thresholds, decoding: Callable[[], bool] = lambda: False
    ) -> None:
        # The base class would set keys and values, which here are made when asked for.
        self.store = LookaheadStore(form)
        self.thresholds = thresholds
        self.decoding = decoding
        self.counts = DecodeCounts()
        self.cumulative_length = 0
        self._nothing = torch.tensor(torch.nan)

    @property
    def is_initialized(self) -> bool:
        """Whether sizes are known."""
        return self.store.arrays is not None

    @property
    def keys(self) -> Tensor | None:
        """The full copy in float32, made anew at every call."""
        return self.store.full()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """The full copy in float32, made anew at every call."""
        return self.store.full()[1] if self.is_initialized else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take sizes from tensors of the shape of keys and values."""
        self.store.append(key_states[:, :, :0], value_states[:, :, :0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values, (batch, key heads, positions, size), and return all that the new queries may see.

        Into an empty store: the new ones themselves, so that a prefill is in full precision. Later under "lamp-decode":
        tensors of the right shape whose numbers are all NaN and whose attribute `lookahead` is a `View`. Under any
        other attention: the full copies in the dtype of the new ones.
        """
        store = self.store
        fresh = store.last == store.first
        first = self._seen_from()
        moved = store.first
        self._append(key_states, value_states, fresh)
        if fresh:
            return key_states, value_states
        first += store.first - moved  # the store may have moved to the front
        last = store.last
        self._after_update()
        if not self.decoding():
            keys, values = store.full(first, last)
            return keys.to(key_states.dtype), values.to(value_states.dtype)
        view = View(self, first, last)
        if self._nothing.dtype != key_states.dtype or self._nothing.device != key_states.device:
            self._nothing = torch.tensor(torch.nan, dtype=key_states.dtype, device=key_states.device)
        batch, heads = key_states.shape[:2]
        keys = self._nothing.expand(batch, heads, last - first, key_states.shape[3])
        values = self._nothing.expand(batch, heads, last - first, value_states.shape[3])
        keys.lookahead = values.lookahead = view  # type: ignore[attr-defined]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `query_length` new queries see, and the position of the first."""
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions seen."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.store.clear()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` positions.

        Raises
        ------
        ValueError
            A positive number, or more than there are.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        if tokens_to_remove and self.is_initialized:
            self.store.crop(-tokens_to_remove)
            self.cumulative_length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sample i becomes what sample beam_idx[i] was."""
        self.store.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample `repeats` times."""
        self.store.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples."""
        self.store.select(indices)

    def offload(self) -> None:
        """Raises: a store stays where it is."""
        raise NotImplementedError("a LookaheadCache can't be offloaded: use transformers' DynamicCache")

    prefetch = offload

    def _seen_from(self) -> int:
        """The first position that a new query may see."""
        return self.store.first

    def _append(self, keys: Tensor, values: Tensor, fresh: bool) -> None:
        self.cumulative_length += keys.shape[2]
        self.store.append(keys, values)

    def _after_update(self) -> None:
        """Nothing to forget."""


class LookaheadSlidingLayer(LookaheadLayer):
    """A layer that sees the last `sliding_window` positions.

    Between calls it keeps one less, or, after `activate_past_recording`, everything until the next `crop`.
    """

    is_sliding = True

    def __init__(
        self,
        form: StoreFormat,
        thresholds: Thresholds,
        decoding: Callable[[], bool] = lambda: False,
        *,
        sliding_window: int,
    ) -> None:
        super().__init__(form, thresholds, decoding)
        self.sliding_window = sliding_window
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep positions that left the window until the next `crop`, which may bring them back."""
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `query_length` new queries see, and the position of the first."""
        kept = min(self.cumulative_length, self.sliding_window - 1)
        return kept + query_length, self.cumulative_length - kept

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` positions, and those that left the window.

        Raises
        ------
        ValueError
            A positive number, or more than there are.
        RuntimeError
            Positions that would come back into the window weren't recorded.
        """
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                f"crop({tokens_to_remove}) of a sliding layer beyond its window of {self.sliding_window} positions: "
                "call activate_past_recording() before the forward pass"
            )
        super().crop(tokens_to_remove)
        self.store.keep_last(self.sliding_window - 1)

    def _seen_from(self) -> int:
        return max(self.store.first, self.store.last - self.sliding_window + 1)

    def _append(self, keys: Tensor, values: Tensor, fresh: bool) -> None:
        beyond = keys.shape[2] - self.sliding_window + 1
        if fresh and not self.record_past and beyond > 0:  # the rest would be forgotten at once
            self.cumulative_length += beyond
            keys, values = keys[:, :, beyond:], values[:, :, beyond:]
        super()._append(keys, values, fresh)

    def _after_update(self) -> None:
        if not self.record_past:
            self.store.keep_last(self.sliding_window - 1)
