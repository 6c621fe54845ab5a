"""A transformers cache whose keys and values are low-bit, with full-precision copies beside them."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from torchlamp.decoding.key_value_store import KeyValueStore, StoreOptions
from torchlamp.policy.decodable import Settings, site_settings
from torchlamp.policy.policy import SitePolicy
from torchlamp.simulation.statistics import Statistics

#: Name of the attention implementation whose decoding reads the low-bit copies.
NAME = "lamp-decode"
_FULL = {"float16": torch.float16, "float32": torch.float32}
_SLACK = 256
#: Tokens of a step that reads low-bit keys and values; longer ones are prompts.
MAX_STEP = 32
#: Key of a saved cache's metadata that holds its layers' options as JSON.
_OPTIONS = "torchlamp_cache_options"


def full_dtype(full: str) -> torch.dtype:
    """The dtype of copies in full by its name. ValueError for another than float16 and float32."""
    if full not in _FULL:
        raise ValueError(f"full={full!r}: allowed are {' and '.join(_FULL)}")
    return _FULL[full]


#: The layer that the attention being run by this thread reads by itself.
_read: ContextVar["LookaheadLayer | None"] = ContextVar("torchlamp_read_layer", default=None)


def read_layer() -> "LookaheadLayer | None":
    """The layer that the running attention reads, set by `reading`."""
    return _read.get()


@contextmanager
def reading(layer: "LookaheadLayer") -> Iterator[None]:
    """While an attention module runs: its attention function reads this layer, whatever `update` returns."""
    token = _read.set(layer)
    try:
        yield
    finally:
        _read.reset(token)


class LookaheadLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer; with a sliding window it keeps what the window's next queries can see."""

    is_croppable = True

    def __init__(
        self,
        options: StoreOptions,
        scores: Settings,
        values: Settings,
        statistics: Statistics | None,
        sliding_window: int | None,
        number: int,
    ) -> None:
        super().__init__()
        self.scores, self.values_settings, self.statistics = scores, values, statistics
        #: Number of the layer in the model, from 0.
        self.number = number
        self.store = KeyValueStore(options)
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        #: Slots before a sliding window that are kept until the store moves its end to the front.
        self.slack = _SLACK
        #: Tokens seen, and how many of them are no longer stored.
        self.seen = 0
        self.dropped = 0

    @property
    def options(self) -> dict[str, Any]:
        """What the stored numbers mean: bits of keys and values, dtype in full, transforms, sliding window."""
        options = asdict(self.store.options)
        full = str(options.pop("full")).removeprefix("torch.")
        return {**options, "full": full, "sliding_window": self.sliding_window}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; the store takes its sizes from the first append."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values (batch, key heads, count, size), float32.

        Returns all that the new queries may see, in float32. Inside of `reading` this layer, where the attention looks
        for itself, a step gets views of the full copies, of their dtype.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        step = self.is_step(count, self.store.length)
        self._let_go(at_once=not step)
        before = self.store.length
        self.store.append(key_states, value_states)
        self.seen += count
        first = self.first(count)
        if step and read_layer() is self:
            slots = slice(first, self.store.length)
            return self.store.full_keys[:, :, slots], self.store.full_values[:, :, slots]
        if before == 0:
            return key_states, value_states
        keys = self.store.full_keys[:, :, first:before].float()
        values = self.store.full_values[:, :, first:before].float()
        # What has just come is there in full, whatever the copy.
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def first(self, count: int, coming: int = 0) -> int:
        """The first slot that the last `count` queries can see, `coming` more being stored."""
        if self.sliding_window is None:
            return 0
        return max(0, self.store.length + coming - count - (self.sliding_window - 1))

    def is_step(self, count: int, before: int) -> bool:
        """Whether `count` tokens that come after `before` stored ones read low-bit keys and values."""
        return count == 1 or (before > 0 and 0 < count <= MAX_STEP)

    def make_room(self, count: int) -> None:
        """Have memory for so many tokens more, in a layer that isn't empty, and move a sliding window if it is time."""
        self._let_go()
        self.store.reserve(count)

    def appended(self, count: int, flags: int) -> None:
        """Count tokens that a layer's kernel has stored; `flags` are its `AppendFlags`."""
        self.store.appended(count, flags)
        self.seen += count

    def hold(self, keys: Tensor, values: Tensor, seen: int) -> None:
        """Hold these (batch, key heads, count, size) and nothing else: the last `count` of `seen` tokens."""
        self.reset()
        self.lazy_initialization(keys, values)
        self.store.append(keys.float(), values.float())
        self.seen, self.dropped = seen, seen - keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` will return."""
        if self.sliding_window is None:
            return self.seen + query_length, 0
        kept = min(self.seen, self.sliding_window - 1)
        return kept + query_length, self.seen - kept

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """The sliding window, or -1: no bound."""
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Keep what a sliding window leaves behind until the next `crop` (assisted decoding)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given as a negative one, or 0.

        Raises
        ------
        ValueError
            A positive number.
        RuntimeError
            A sliding window would need what it no longer has.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative one"
            )
        removed = min(-tokens_to_remove, self.seen)
        window = self.sliding_window
        if window is not None and removed and self.dropped:
            needed = min(self.seen - removed, window - 1)
            if self.store.length - removed < needed:
                raise RuntimeError(
                    f"crop({tokens_to_remove}): the sliding window of {window} has let go of what comes back into it; "
                    "call activate_past_recording before decoding"
                )
        self.seen -= removed
        self.store.crop(self.store.length - removed)
        if window is not None and self.record_past:
            self._drop(self.store.length - (window - 1) - self.slack)

    def reset(self) -> None:
        """Forget everything."""
        self.store.clear()
        self.seen = self.dropped = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of the batch in this order."""
        self.store.select(beam_idx.to("cpu"))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        if self.store.capacity:
            batch = self.store.full_keys.shape[0]
            self.store.select(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        if self.store.capacity:
            self.store.select(torch.arange(self.store.full_keys.shape[0])[indices])

    def offload(self) -> None:
        """Nothing to do: the cache is in main memory."""

    def prefetch(self) -> None:
        """Nothing to do: the cache is in main memory."""

    def _let_go(self, at_once: bool = False) -> None:
        """Forget what a sliding window has left behind, once it is much or `at_once`."""
        if self.sliding_window is not None and not self.record_past:
            spare = self.store.length - (self.sliding_window - 1)
            if at_once or spare >= max(self.slack, self.sliding_window):
                self._drop(spare)

    def _drop(self, count: int) -> None:
        if count > 0:
            self.store.drop_first(count)
            self.dropped += count


def check_cache(config: Any) -> None:
    """ValueError for a model whose own cache holds more than keys and values (states of convolutions, Mamba, ...)."""
    layers = DynamicCache(config=config).layers
    others = {
        type(layer).__name__
        for layer in layers
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    if others:
        raise ValueError(f"its cache holds more than keys and values ({', '.join(sorted(others))})")


def can_rotate(config: Any) -> bool:
    """Whether the head sizes of a model's config are powers of two, so that a Hadamard matrix rotates the heads."""
    text = config.get_text_config(decoder=True)
    # Gemma 4's layers have sizes of their own.
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    # With positions apart from the rest (DeepSeek), keys are longer than what `head_dim` says.
    sizes: list[int] = [
        getattr(layer, "qk_head_dim", None)
        or getattr(layer, "head_dim", None)
        or layer.hidden_size // layer.num_attention_heads
        for layer in layers
    ]
    return all(size & (size - 1) == 0 for size in sizes)


class LookaheadCache(Cache):  # type: ignore[misc]
    """Keys and values of every layer as 4- or 8-bit integers beside full-precision copies.

    Under the attention implementation "lamp-decode", which `torchlamp.prepare` sets, a decoded token reads low-bit
    keys, recomputes the scores whose weight 2 z (1 - z) r exceeds the threshold of `scores` (r the root mean square of
    the quantisation error), and reads the values of keys with a probability z above that of `values` in full. Under any
    other implementation it is an ordinary cache.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the model.
    scores, values : str or SitePolicy
        ``int8`` or ``int4``, and the rule, for example ``"int8+running:0.001"`` and ``"int8+topz:0.003"``.
    full : str
        ``"float16"`` halves the memory of the full copies and holds numbers up to 65504; ``"float32"`` is exact.
    center, hadamard : bool, optional
        Quantise keys less their mean over the first ones, and rotated by the Hadamard matrix, for which the head size
        must be a power of two. None is what `scores` names (``int8.center.hadamard``); if it names neither, both,
        the rotation where the head size allows it.
    statistics : Statistics, optional
        Where recomputed scores and values read in full are counted.

    Raises
    ------
    ValueError
        A format, rule or option that isn't known.
    """

    def __init__(
        self,
        config: Any,
        scores: str | SitePolicy = "int8+running:0.001",
        values: str | SitePolicy = "int8+topz:0.003",
        *,
        full: str = "float16",
        center: bool | None = None,
        hadamard: bool | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        full_numbers = full_dtype(full)
        key_settings = site_settings("scores", SitePolicy.parse(scores))
        value_settings = site_settings("values", SitePolicy.parse(values))
        text = config.get_text_config(decoder=True)
        named = key_settings.center or key_settings.hadamard
        if center is None:
            center = key_settings.center or not named
        if hadamard is None:
            hadamard = key_settings.hadamard if named else can_rotate(config)
        options = StoreOptions(key_settings.bits, value_settings.bits, full_numbers, center, hadamard)
        kinds = getattr(text, "layer_types", None)
        window = getattr(text, "sliding_window", None)
        if kinds is None:
            kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
        layers = [
            LookaheadLayer(
                options,
                key_settings,
                value_settings,
                statistics,
                window if kind == "sliding_attention" else None,
                number,
            )
            for number, kind in enumerate(kinds)
        ]
        super().__init__(layers=layers)
        #: Called when the cache is gone and its memory free; None: nobody waits for it.
        self.after: Callable[[], object] | None = None

    def __del__(self) -> None:
        """Free the layers first, so that what comes after finds their memory free."""
        after = vars(self).get("after")
        if after is not None and not sys.is_finalizing():
            self.layers: list[Any] = []
            after()

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of the low-bit copies and of the full-precision ones."""
        low, full = zip(*(layer.store.bytes for layer in self.layers), strict=True)
        return sum(low), sum(full)

    def take(self, cache: DynamicCache) -> None:
        """Hold what the model's own cache holds, and nothing else. ValueError for one of another number of layers."""
        if len(cache.layers) != len(self.layers):
            raise ValueError(f"a cache of {len(cache.layers)} layers: this one has {len(self.layers)}")
        for mine, other in zip(self.layers, cache.layers, strict=True):
            if other.is_initialized:
                mine.hold(other.keys, other.values, other.get_seq_length())
            else:
                mine.reset()

    def save(self, path: str | Path) -> None:
        """Write the contents to a safetensors file. OSError where that can't be."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {}
        options = json.dumps([layer.options for layer in self.layers])
        for number, layer in enumerate(self.layers):
            tensors[f"{number}.seen"] = torch.tensor([layer.seen, layer.dropped])
            tensors |= {f"{number}.{name}": tensor for name, tensor in layer.store.state().items()}
        try:
            save_file(tensors, path, metadata={_OPTIONS: options})
        except SafetensorError as error:
            raise OSError(f"the cache can't be written to {str(path)!r}: {error}") from error

    def restore(self, path: str | Path) -> None:
        """Take the contents of a file that `save` wrote, by a cache of the same model and options.

        Raises
        ------
        OSError
            The file can't be read.
        ValueError
            It was saved by a cache of another number of layers, or of other options: bits, dtype of the full copies,
            transforms, sliding windows. Then this cache is as it was.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise OSError(f"{str(path)!r} holds no saved cache: {error}") from error
        self._check_options(path, metadata.get(_OPTIONS))
        for number, layer in enumerate(self.layers):
            own = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{number}.")}
            layer.seen, layer.dropped = own.pop("seen").tolist()
            layer.store.restore(own)
            if own:
                layer.lazy_initialization(own["full_keys"].float()[:0], own["full_values"])

    def _check_options(self, path: str | Path, saved: str | None) -> None:
        """Refuse the options of a file, as `save` writes them, unless they are this cache's."""
        if saved is None:
            raise ValueError(f"{str(path)!r} doesn't say with which options it was saved: save it again")
        options = json.loads(saved)
        if len(options) != len(self.layers):
            raise ValueError(
                f"{str(path)!r} was saved by a cache of {len(options)} layers, this one has {len(self.layers)}"
            )
        for number, (layer, theirs) in enumerate(zip(self.layers, options, strict=True)):
            for name, own in layer.options.items():
                if theirs.get(name) != own:
                    raise ValueError(
                        f"{str(path)!r} was saved with {name}={theirs.get(name)} in layer {number}, this cache has "
                        f"{name}={own}: make the cache with the same options"
                    )
