"""A transformers cache that keeps keys and values twice, low-bit to read and in full precision for what matters."""

import json
from os import PathLike
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DummyLayer, get_layer_types_and_kwargs

from torchlamp.compositions.decode_rules import SCORES_RULE, SKIP, VALUES_RULE, thresholds
from torchlamp.integrations.decode_attention import NAME
from torchlamp.integrations.lookahead_layer import DecodeCounts, LookaheadLayer, LookaheadSlidingLayer
from torchlamp.kernels.decode_types import StoreFormat
from torchlamp.rules.rule import Rule

_FULL, _SLIDING = "full_attention", ("sliding_attention", "chunked_attention")


class LookaheadCache(Cache):  # type: ignore[misc]
    """A cache for decoding with look-ahead: ``model.generate(..., past_key_values=LookaheadCache(model.config))``.

    With ``model.set_attn_implementation("lamp-decode")`` one native call a layer scores all low-bit keys, looks ahead
    through the softmax, recomputes the few scores that it would amplify from full-precision keys, and sums values,
    low-bit where their probability is small and in full where it is large. A prefill is in full precision. Under any
    other attention implementation the cache hands out its full-precision copies.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's own object, whose attention implementation is looked up at every forward pass.
    keys, values : "int8" or "int4"
        The low-bit copies.
    scores_rule : str or Rule
        `running:T`, `none` or `all`: see `torchlamp.compositions.decode_rules.thresholds`.
    values_rule : str or Rule
        `topz:T`, `none` or `all`.
    full : "int16", "float16" or "float32"
        The full-precision copies, see `StoreFormat`.
    center, hadamard : bool
        What is done to keys before they become low-bit, see `StoreFormat`.
    skip : float
        Values are left out that share less than this of the probability together.

    Raises
    ------
    ValueError
        A choice that isn't one, or a model with layers that aren't attention layers.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        keys: str = "int8",
        values: str = "int8",
        scores_rule: str | Rule = SCORES_RULE,
        values_rule: str | Rule = VALUES_RULE,
        full: str = "int16",
        center: bool = True,
        hadamard: bool = False,
        skip: float = SKIP,
    ) -> None:
        self.form = StoreFormat(keys, values, full, center, hadamard)  # type: ignore[arg-type]
        self.config = config
        limits = thresholds(scores_rule, values_rule, skip)
        decoder = config.get_text_config(decoder=True)
        layers: list[LookaheadLayer | DummyLayer] = []
        for kind, own in zip(*get_layer_types_and_kwargs(decoder), strict=True):
            if kind == _FULL:
                layers.append(LookaheadLayer(self.form, limits, self.decoding))
            elif kind in _SLIDING:
                layers.append(LookaheadSlidingLayer(self.form, limits, self.decoding, **own))
            elif kind == "dummy":
                layers.append(DummyLayer())
            else:
                raise ValueError(
                    f"layer {len(layers)} of {type(config).__name__} is of type {kind!r}: LookaheadCache keeps keys "
                    "and values of full and sliding attention; use transformers' DynamicCache"
                )
        super().__init__(layers=layers)
        self._first = next((n for n, own in enumerate(layers) if isinstance(own, LookaheadLayer)), 0)
        self._decoding = self._attends_with_lamp()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values to a layer, and return all that its new queries may see; see `LookaheadLayer.update`."""
        if layer_idx == self._first:  # configs are slow to ask
            self._decoding = self._attends_with_lamp()
        keys, values = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return keys, values

    def decoding(self) -> bool:
        """Whether the model attended with "lamp-decode" when its first layer was last updated."""
        return self._decoding

    def _attends_with_lamp(self) -> bool:
        if self.config._attn_implementation == NAME:
            return True
        decoder: Any = self.config.get_text_config(decoder=True)
        return decoder is not self.config and decoder._attn_implementation == NAME

    @property
    def lookahead_layers(self) -> list[LookaheadLayer]:
        """The layers that have a store."""
        return [layer for layer in self.layers if isinstance(layer, LookaheadLayer)]

    @property
    def counts(self) -> DecodeCounts:
        """What decoding met, over all layers, since the cache was made; a layer's own is `layers[i].counts`."""
        total = DecodeCounts()
        for layer in self.lookahead_layers:
            own = layer.counts
            total.add((own.recomputed, own.scores, own.read_in_full, own.values))
        return total

    @property
    def recompute_rate(self) -> float:
        """Share of the scores of decoding that were recomputed."""
        return self.counts.recompute_rate

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the `low` and of the `full` copies of all layers, room for growth included."""
        sizes = [layer.store.memory_bytes for layer in self.lookahead_layers]
        return {kind: sum(size[kind] for size in sizes) for kind in ("low", "full")}

    def state_dict(self) -> dict[str, Tensor]:
        """The stores' tensors by names such as "3.key_codes", and each layer's length."""
        state = {}
        for number, layer in enumerate(self.layers):
            if isinstance(layer, LookaheadLayer):
                for name, tensor in layer.store.state_dict().items():
                    state[f"{number}.{name}"] = tensor
                state[f"{number}.length"] = torch.tensor(layer.cumulative_length)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` of a cache for the same model and format gave.

        Raises
        ------
        ValueError
            Of other layers or another format.
        """
        own = {n for n, layer in enumerate(self.layers) if isinstance(layer, LookaheadLayer)}
        found = {int(name.split(".")[0]) for name in state}
        if own != found:
            raise ValueError(f"saved layers {sorted(found)} don't fit a model with layers {sorted(own)}")
        for number in own:
            prefix = f"{number}."
            part = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
            layer = self.layers[number]
            layer.cumulative_length = int(part.pop("length"))
            layer.store.load_state_dict(part)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to a safetensors file."""
        tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, path, metadata={"format": json.dumps(vars(self.form))})

    @classmethod
    def load(cls, path: str | PathLike[str], config: PreTrainedConfig, **rules: Any) -> "LookaheadCache":
        """Read what `save` wrote.

        Parameters
        ----------
        path
            The file.
        config
            Of the model that the cache belongs to.
        **rules
            `scores_rule`, `values_rule` and `skip`, if not the defaults; the format is the file's.

        Raises
        ------
        ValueError
            A file that `save` didn't write, or of another model.
        """
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("format")
            if written is None:
                raise ValueError(
                    f"{str(path)!r} is no saved LookaheadCache: write it with LookaheadCache.save"
                )
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        cache = cls(config, **json.loads(written), **rules)
        cache.load_state_dict(state)
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> "LookaheadCache":
        """A copy for the same model: the config stays the model's own, which says how it attends."""
        from copy import deepcopy

        memo[id(self.config)] = self.config
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            setattr(copied, name, deepcopy(value, memo))
        return copied
