"""Whole decoder layers of a prepared model, each in one native call.

Modules one by one cost some fifty small operations a layer, a third of a token's time at the size of SmolLM2. Layers
whose formula is known by their class take this way when all their sites are low-bit; the numbers are those of the
modules' own kernels, up to float32 rounding in norms and rotary positions.

What Python and torch do around a layer still takes longer than its attention, so a layer goes through those behind it
at once, and they hand on what they find done. Only where nothing could tell the difference: models known to do nothing
between layers, no hooks, the layers' own order and number, one mask and one set of positions.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

from torchlamp.huggingface.decode_forwards import LinearsDecode, MlpDecode
from torchlamp.huggingface.lookahead_cache import LookaheadCache
from torchlamp.huggingface.masks import seen_keys
from torchlamp.huggingface.plain_modules import PlainModules, is_known, is_one_of
from torchlamp.huggingface.site_forwards import Forward
from torchlamp.kernels.dispatch import NativeKernels, NativeObject, native_for
from torchlamp.simulation.statistics import Statistics

#: Families of transformers whose decoder layers have RMSNorms, rotary positions over the whole head and a gated MLP:
#: how their classes' names begin, and what their norms add to the weight (Gemma's multiply by 1 + w).
FAMILIES = {
    "llama": ("Llama", 0.0),
    "mistral": ("Mistral", 0.0),
    "qwen2": ("Qwen2", 0.0),
    "qwen3": ("Qwen3", 0.0),
    "gemma3": ("Gemma3", 1.0),
}
#: Models of those families that hand hidden states from layer to layer untouched.
DECODERS = {
    name: f"{prefix}{'Text' if name == 'gemma3' else ''}Model" for name, (prefix, _) in FAMILIES.items()
}


class LayerDecode(Forward):
    """A decoder layer for single tokens with a look-ahead cache; the layer's own forward for everything else."""

    def __init__(
        self,
        module: nn.Module,
        qkv: LinearsDecode,
        out: LinearsDecode,
        mlp: MlpDecode,
        statistics: Statistics,
        forwards: Mapping[nn.Module, Forward],
    ) -> None:
        super().__init__(module)
        self.qkv, self.out, self.mlp, self.statistics = qkv, out, mlp, statistics
        self.inside = PlainModules(module, forwards)
        attention: Any = module.self_attn
        self.family = family_of(module)
        self.attention = attention
        self.size = int(attention.head_dim)
        queries, keys, _ = (n // self.size for n in qkv.sizes)
        self.heads, self.kv_heads = queries, keys
        self.scaling = float(attention.scaling)
        self.number = int(attention.layer_idx)
        #: Layers in a row that see the same mask and positions, this one among them.
        self.chain: Sequence[LayerDecode] = [self]
        self._native = NativeObject()

    def run_(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One native call for each layer of the chain from here, or the layer."""
        cache: Any = kwargs.get("past_key_values")
        if not isinstance(cache, LookaheadCache):
            return self.original(hidden_states, *args, **kwargs)
        if cache.is_done(self.number, hidden_states):
            return hidden_states
        if not self.inside.hold() or self.own is not None:
            return self.original(hidden_states, *args, **kwargs)
        angles: Any = kwargs.get("position_embeddings")
        native = native_for()
        mask = kwargs.get("attention_mask")
        seen = None if mask is None else seen_keys(mask)
        fast = (
            not args
            and (mask is None or seen is not None)
            and hidden_states.shape[1] == 1
            and angles is not None
            and hidden_states.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not kwargs.get("output_attentions")
            and cache.layers[self.number].has_room()
        )
        if not fast or native is None:  # the modules one by one
            return self.original(hidden_states, *args, **kwargs)
        batch = len(hidden_states)
        cosines, sines = cache.angles_of(angles, self.size)
        if seen is not None:
            mask = seen[:, 0].expand(batch, -1).contiguous().view(torch.uint8)
        result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        x, y = hidden_states.detach().reshape(batch, -1).contiguous().numpy(), result.view(batch, -1).numpy()
        threads, record = torch.get_num_threads(), self.statistics.record
        for layer in self._together(cache):
            part = cache.layers[layer.number]
            store, first = part.store, part.first(1, coming=1)
            scores, values, seen, neurons, columns, flags = layer.kernel(native).step(
                x, cosines, sines, store.kernel(native), store.length, first, mask, layer.scaling,
                part.scores.threshold, part.values_settings.threshold, store.has_nonfinite_values, y, threads,
            )  # fmt: skip
            part.appended(flags)
            record("scores", layer.number, scores, seen * layer.heads)
            record("values", layer.number, values, seen * layer.kv_heads)
            record("mlp_up", layer.number, neurons, batch * layer.mlp.mlp.gate.rows)
            record("mlp_down", layer.number, columns, batch * layer.mlp.mlp.gate.rows)
            x = y
        cache.done = None if layer is self else (result, layer.number)
        return result

    def _together(self, cache: LookaheadCache) -> Sequence["LayerDecode"]:
        """The layers from this one on that can go at once."""
        ready = [self]
        if _has_global_hooks() or not self._is_plain():
            return ready
        count = self.attention.config.num_hidden_layers  # early exit makes it smaller
        for layer in self.chain[self.number - self.chain[0].number + 1 :]:
            if layer.number >= count or not layer._is_plain() or not cache.layers[layer.number].has_room():
                break
            ready.append(layer)
        return ready

    def _is_plain(self) -> bool:
        """Whether nobody watches the layer, or has put another forward over this one."""
        module = self.module
        watched = module._forward_hooks or module._forward_pre_hooks
        return vars(module).get("forward") is self and not watched and self.inside.hold()

    def kernel(self, native: NativeKernels) -> Any:
        """The native object over the layer's copies and weights."""
        return self._native.get(native, self._make)

    def _make(self, native: NativeKernels) -> Any:
        layer, attention, plus = self.module, self.attention, FAMILIES[self.family or ""][1]
        four = hasattr(layer, "pre_feedforward_layernorm")

        def weight(owner: nn.Module, name: str) -> Tensor | None:
            norm = getattr(owner, name, None)
            return None if norm is None else (norm.weight.detach() + plus)

        second = layer.post_attention_layernorm
        return native.extension.Layer(
            native.instruction_set,
            self.qkv.matrix.kernel(native),
            self.out.matrix.kernel(native),
            self.mlp.mlp.kernel(native),
            weight(layer, "input_layernorm"),
            weight(layer, "post_attention_layernorm") if four else None,
            weight(layer, "pre_feedforward_layernorm" if four else "post_attention_layernorm"),
            weight(layer, "post_feedforward_layernorm") if four else None,
            weight(attention, "q_norm"),
            weight(attention, "k_norm"),
            getattr(second, "variance_epsilon", getattr(second, "eps", None)),
            self.qkv.bias,
            self.out.bias,
            self.heads,
            self.kv_heads,
            self.size,
            *self.mlp.thresholds,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_native": NativeObject()}


def can_fuse(layer: nn.Module) -> bool:
    """Whether a layer's parts are those of one of `FAMILIES`, all the way down, so that its formula is known."""
    family = family_of(layer)
    if family is None:
        return False
    prefix, _ = FAMILIES[family]
    parts = {"self_attn": "Attention", "mlp": "MLP", "input_layernorm": "RMSNorm"}
    norms = [m for m in layer.modules() if is_one_of(type(m), [f"{prefix}RMSNorm"], family)]
    named = [m for name, m in layer.named_modules() if name.endswith("norm")]
    attention: Any = getattr(layer, "self_attn", None)
    config = getattr(attention, "config", None)
    return (
        all(is_one_of(type(getattr(layer, at, None)), [prefix + name], family) for at, name in parts.items())
        and norms == named
        and len({getattr(m, "variance_epsilon", getattr(m, "eps", None)) for m in norms}) == 1
        and getattr(config, "partial_rotary_factor", None) in (None, 1, 1.0)
        and getattr(attention, "attn_logit_softcapping", None) is None
    )


def family_of(layer: nn.Module) -> str | None:
    """The family of `FAMILIES` whose decoder layer this is; None: another layer."""
    for family, (prefix, _) in FAMILIES.items():
        if is_one_of(type(layer), [f"{prefix}DecoderLayer"], family) and is_known(type(layer)):
            return family
    return None


def chain(model: Any, layers: Sequence[LayerDecode]) -> None:
    """Tell layers of a model which others follow them with the same mask and positions."""
    decoder = type(model.get_decoder())
    if not any(is_one_of(decoder, [name], family) for family, name in DECODERS.items()):
        return

    def kind(layer: LayerDecode) -> Any:
        kinds = getattr(layer.attention.config, "layer_types", None)
        return None if kinds is None else kinds[layer.number]

    runs = itertools.groupby(enumerate(layers), key=lambda at: (at[1].number - at[0], kind(at[1])))
    for _, run in runs:
        together = [layer for _, layer in run]
        for layer in together:
            layer.chain = together


def _has_global_hooks() -> bool:
    """Whether somebody watches every module of the process."""
    return bool(_modules._global_forward_hooks or _modules._global_forward_pre_hooks)
