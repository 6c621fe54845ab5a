"""A prepared model: which modules run low-bit forwards, what runs whole, the cache of `generate`, and the way back."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchlamp.huggingface.copies import Copies
from torchlamp.huggingface.decode_attention import NAME
from torchlamp.huggingface.decode_forwards import (
    AttentionDecode,
    DecodeForward,
    LinearsDecode,
    MlpDecode,
    check_attention,
    head_decode,
    linears_decode,
    mlp_decode,
)
from torchlamp.huggingface.decode_layer import NativeLayer, can_fuse, is_decoder
from torchlamp.huggingface.decode_step import StepDecode
from torchlamp.huggingface.lookahead_cache import LookaheadCache, full_dtype
from torchlamp.huggingface.site_forwards import Forward, own_forward, set_forward
from torchlamp.huggingface.sites import Sites
from torchlamp.huggingface.wide_model import WideModel
from torchlamp.policy.decodable import Settings
from torchlamp.policy.site import Site
from torchlamp.policy.sites import SITES
from torchlamp.simulation.statistics import Statistics
from torchlamp.steps import each, work

logger = logging.getLogger("torchlamp.decoding")
_GENERATE = "_prepare_cache_for_generation"


@dataclass
class Memory:
    """Bytes of a prepared model's weights: what it had, and what was added."""

    full: int = 0
    low_bit: int = 0
    #: Full-precision copies made beside the model's own tensors (the transposed down projections).
    extra_full: int = 0
    #: False: what it had stays in its file.
    resident: bool = True

    def __str__(self) -> str:
        added = self.low_bit + self.extra_full
        full = f"weights {self.full / 1e6:.0f} MB" + ("" if self.resident else " in their file")
        return f"{full}, low-bit and transposed copies {added / 1e6:.0f} MB more"


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


@dataclass
class Layer:
    """A decoder layer, or what the model has once (number -1), and what decodes its sites."""

    number: int
    module: nn.Module
    #: Low-bit rows by their sites.
    rows: dict[str, LinearsDecode] = field(default_factory=dict)
    mlp: MlpDecode | None = None
    has_attention: bool = False


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
    copies : Copies
        Where the copies are from.
    wide : WideModel
        What makes a half-precision model compute in float32, in place already; `undo` undoes it last.
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
        copies: Copies,
        wide: WideModel,
        full: str = "float16",
        top: int = 1,
    ) -> None:
        self.model, self.settings, self.statistics, self.memory = model, settings, statistics, memory
        self.copies, self.wide = copies, wide
        self.full, self.top = full_dtype(full), top
        self.sites = Sites(model)
        in_layers = any(SITES[name].place.in_layers for name in settings)
        if in_layers and not self.sites.layers:
            raise ValueError(
                f"{type(model).__name__}: no list of decoder layers found, so it can't be prepared"
            )
        #: By their modules.
        self.forwards: dict[nn.Module, Forward] = {}
        packed = each("packing layers", self.sites.layers)
        layers = [self._layer(number, layer) for number, layer in enumerate(packed)]
        whole = [layer for layer in layers if layer is not None]
        decoder = model.get_decoder()
        if (
            whole
            and len(whole) == len(layers)
            and is_decoder(decoder, whole[0].family)
            and decoder not in self.forwards
        ):
            self._add(
                StepDecode(decoder, whole, {**wide.forwards, **self.forwards}, statistics, wide.weights)
            )
        for name in settings:
            if not SITES[name].place.in_layers:
                with work(f"packing {name}"):
                    self._decode(SITES[name], Layer(-1, model))
        if wide.weights is not None:
            mlps = [f.mlp.down_full for f in self.forwards.values() if isinstance(f, MlpDecode)]
            wide.weights.add(columns for columns in mlps if columns is not None)
        del self.copies  # the forwards hold what they need of them
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
        self.wide.undo()

    def _add(self, forward: Forward) -> None:
        if isinstance(forward, DecodeForward):
            forward.weights = self.wide.weights
        self.forwards[forward.module] = forward

    def _layer(self, number: int, module: nn.Module) -> NativeLayer | None:
        """Add the forwards of a layer's modules; the whole layer, where nothing but them need run."""
        layer, before = Layer(number, module), set(self.forwards)
        for name in self.settings:
            if SITES[name].place.in_layers:
                self._decode(SITES[name], layer)
        if self.wide.weights is not None:
            self.wide.weights.release()
        new = [forward for module, forward in self.forwards.items() if module not in before]
        own = any(forward.own is not None for forward in new)
        if own or layer.mlp is None or not layer.has_attention or not can_fuse(module, layer.rows):
            return None
        return NativeLayer(module, layer.rows, layer.mlp)

    def _decode(self, site: Site, layer: "Layer") -> None:
        """Add what decodes a site; the partner of a site has its kernel."""
        assert site.kernel is not None
        if site.kernel.form is not None:
            FORMS[site.kernel.form](self, site, layer)

    def _rows(self, site: Site, layer: "Layer") -> None:
        """Linear layers whose copies are read as they are."""
        modules = self.sites.modules(site, layer.module)
        for other, rows in layer.rows.items():
            for module in set(modules) & set(rows.modules):
                self.sites.check_free(module, other, site.name)
        name = _copy_name(site, layer)
        forwards, group = linears_decode(self.sites, modules, self.settings[site.name], self.copies, name)
        for forward in forwards:
            self._add(forward)
        self.memory.low_bit += group.bytes
        layer.rows[site.name] = group

    def _attention(self, site: Site, layer: "Layer") -> None:
        """Keys and values of a look-ahead cache."""
        config = self.model.config.get_text_config(decoder=True)
        self._add(AttentionDecode(check_attention(self.sites, layer.module), config, layer.number))
        layer.has_attention = True

    def _mlp(self, site: Site, layer: "Layer") -> None:
        """A gated MLP: the site and its partner."""
        assert site.partner is not None
        up, down = self.settings[site.name], self.settings[site.partner]
        layer.mlp = mlp_decode(
            self.sites, layer.number, up, down, self.statistics, self.full, self.wide.forwards, self.copies,
            mlp_name(layer.number),
        )  # fmt: skip
        self._add(layer.mlp)
        low, full = layer.mlp.mlp.bytes
        self.memory.low_bit += low
        self.memory.extra_full += full

    def _head(self, site: Site, layer: "Layer") -> None:
        """The output embedding."""
        name = _copy_name(site, layer)
        head = head_decode(self.sites, self.settings[site.name], self.top, self.statistics, self.copies, name)
        self._add(head)
        self.memory.low_bit += head.head.head.bytes

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


def mlp_name(number: int) -> str:
    """The name of a layer's MLP among the copies."""
    return f"layer {number} mlp"


def _copy_name(site: Site, layer: Layer) -> str:
    return f"layer {layer.number} {site.name}" if site.place.in_layers else site.name


#: What decodes a site, by the names that the kernels of sites' records use.
FORMS: dict[str, Callable[[DecodePlan, Site, Layer], None]] = {
    "attention": DecodePlan._attention,
    "rows": DecodePlan._rows,
    "mlp": DecodePlan._mlp,
    "head": DecodePlan._head,
}
