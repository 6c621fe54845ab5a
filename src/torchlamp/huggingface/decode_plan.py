"""A prepared model: which modules run low-bit forwards, what runs whole, the cache of `generate`, and the way back."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchlamp.huggingface.decode_attention import NAME
from torchlamp.huggingface.decode_forwards import (
    AttentionDecode,
    DecodeForward,
    LinearsDecode,
    MlpDecode,
    head_decode,
    linears_decode,
    mlp_decode,
)
from torchlamp.huggingface.decode_layer import NativeLayer, can_fuse, is_decoder
from torchlamp.huggingface.decode_step import StepDecode
from torchlamp.huggingface.lookahead_cache import LookaheadCache, full_dtype
from torchlamp.huggingface.site_forwards import Forward, own_forward, set_forward
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.decodable import Settings
from torchlamp.simulation.statistics import Statistics

logger = logging.getLogger("torchlamp.decoding")
_GENERATE = "_prepare_cache_for_generation"


@dataclass
class Memory:
    """Bytes of a prepared model's weights: what it had, and what was added."""

    full: int = 0
    low_bit: int = 0
    #: Full-precision copies made beside the model's own tensors (the transposed down projections).
    extra_full: int = 0

    def __str__(self) -> str:
        added = self.low_bit + self.extra_full
        return f"weights {self.full / 1e6:.0f} MB, low-bit and transposed copies {added / 1e6:.0f} MB more"


@dataclass(frozen=True, eq=False)
class _WithLookaheadCache:
    """A model's `_prepare_cache_for_generation` with a look-ahead cache; no closure, so that it can be pickled."""

    model: Any
    #: The method that the model's instance had of its own; None: its class's.
    own: Callable[..., Any] | None
    cache: Callable[[], LookaheadCache]

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        wanted = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if wanted and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.cache()
        if self.own is not None:
            return self.own(generation_config, model_kwargs, *args, **kwargs)
        return getattr(type(self.model), _GENERATE)(
            self.model, generation_config, model_kwargs, *args, **kwargs
        )


class DecodePlan:
    """The forwards that a policy gives a model; made at once, put in place by `put`, taken away by `undo`.

    Modules one by one are the general way. Where every layer is one that `can_fuse` knows and the decoder does nothing
    between them, the decoder gets a forward of its own, too, for steps that nobody watches (`StepDecode`).

    Parameters
    ----------
    model : transformers.PreTrainedModel
    settings : dict of str to Settings
        What the kernel of each named site is told.
    statistics, memory
        Where the forwards count, and where the copies' sizes are added.
    full : str
        Dtype of the copies in full.
    top : int
        So many largest logits are those of the full-precision head.

    Raises
    ------
    ValueError
        No decoder layers, or a site that the architecture doesn't know.
    """

    def __init__(
        self,
        model: Any,
        settings: dict[str, Settings],
        statistics: Statistics,
        memory: Memory,
        full: str = "float16",
        top: int = 1,
    ) -> None:
        self.model, self.settings, self.statistics, self.memory = model, settings, statistics, memory
        self.full = full_dtype(full)
        self.sites = Sites(model)
        if not self.sites.layers:
            raise ValueError(
                f"{type(model).__name__}: no list of decoder layers found, so it can't be prepared"
            )
        #: By their modules.
        self.forwards: dict[nn.Module, Forward] = {}
        layers = [self._layer(number, layer) for number, layer in enumerate(self.sites.layers)]
        whole = [layer for layer in layers if layer is not None]
        decoder = model.get_decoder()
        if (
            len(whole) == len(layers)
            and is_decoder(decoder, whole[0].family)
            and decoder not in self.forwards
        ):
            self._add(StepDecode(decoder, whole, dict(self.forwards), statistics))
        if "lm_head" in settings:
            head = head_decode(self.sites, settings["lm_head"], top, statistics)
            self._add(head)
            memory.low_bit += head.head.head.bytes
        self._undo: list[Callable[[], object]] = []

    def put(self, cache: Callable[[], LookaheadCache] | None) -> None:
        """Give the modules their forwards and, if there is one to make, `generate` the cache."""
        names = {module: name for name, module in self.model.named_modules()}
        for module, forward in self.forwards.items():
            if isinstance(forward, DecodeForward) and not forward.is_plain():
                logger.warning(
                    "%s: runs in full precision, since its %s isn't torch's or transformers' own, or is watched",
                    names[module],
                    type(module).__name__,
                )
            self._put(forward)
        if cache is not None:
            self._use_cache(cache)

    def undo(self) -> None:
        """Give the model its own attention, forwards and cache back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def _add(self, forward: Forward) -> None:
        self.forwards[forward.module] = forward

    def _layer(self, number: int, layer: nn.Module) -> NativeLayer | None:
        """Add the forwards of a layer's modules; the whole layer, where nothing but them need run."""
        told, before = self.settings, set(self.forwards)
        groups = {
            site: self._linears(modules, told[site])
            for site, modules in (
                ("qkv", self.sites.qkv(layer) if "qkv" in told else []),
                ("attention_out", [self.sites.attention_out(layer)] if "attention_out" in told else []),
            )
            if site in told
        }
        if "scores" in told:
            self._add(
                AttentionDecode(
                    self.sites.attention(layer), self.model.config.get_text_config(decoder=True), number
                )
            )
        mlp = self._mlp(number) if "mlp_up" in told else None
        new = [forward for module, forward in self.forwards.items() if module not in before]
        own = any(forward.own is not None for forward in new)
        if mlp is None or len(groups) < 2 or "scores" not in told or own or not can_fuse(layer):
            return None
        if len(groups["qkv"].sizes) != 3:
            return None
        return NativeLayer(layer, groups["qkv"], groups["attention_out"], mlp)

    def _linears(self, modules: list[nn.Module], told: Settings) -> LinearsDecode:
        forwards, group = linears_decode(self.sites, modules, told)
        for forward in forwards:
            self._add(forward)
        self.memory.low_bit += group.bytes
        return group

    def _mlp(self, number: int) -> MlpDecode:
        told = self.settings
        mlp = mlp_decode(self.sites, number, told["mlp_up"], told["mlp_down"], self.statistics, self.full)
        self._add(mlp)
        low, full = mlp.mlp.bytes
        self.memory.low_bit += low
        self.memory.extra_full += full
        return mlp

    def _put(self, forward: Forward) -> None:
        module = forward.module
        before = own_forward(module)
        set_forward(module, forward)
        self._undo.append(functools.partial(set_forward, module, before))

    def _use_cache(self, cache: Callable[[], LookaheadCache]) -> None:
        """Set the attention implementation, and let `generate` make a look-ahead cache where it would make its own.

        transformers 5.23 has no public place for this: `generate` takes a cache as an argument of each call, and
        `GenerationConfig.cache_implementation` names only caches of its own. A wrapped `generate` would have to guess
        the generation config and count beams; the method below is handed both, just before the default is made.
        """
        model = self.model
        before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        self._undo.append(functools.partial(model.set_attn_implementation, before))
        own = vars(model).get(_GENERATE)  # other tools replace it, too
        setattr(model, _GENERATE, _WithLookaheadCache(model, own, cache))
        give_back = functools.partial(delattr, model, _GENERATE)
        self._undo.append(give_back if own is None else functools.partial(setattr, model, _GENERATE, own))
