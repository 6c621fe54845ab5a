"""Whole decoder layers of a prepared model, each in one native call.

Modules one by one cost some fifty small operations a layer, a third of a token's time at the size of SmolLM2. Layers
whose formula is known by their class take this way when all their sites are low-bit; the numbers are those of the
modules' own kernels, up to float32 rounding in norms and rotary positions.

What Python and torch do around a layer still takes longer than its attention, so a layer goes through those behind it
at once, and they hand on what they find done. Only where nothing could tell the difference: models known to do nothing
between layers, no hooks, the layers' own order and number, one mask and one set of positions.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

from torchlamp.huggingface.decode_forwards import LinearsDecode, MlpDecode
from torchlamp.huggingface.lookahead_cache import LookaheadCache
from torchlamp.huggingface.site_forwards import Forward
from torchlamp.kernels.dispatch import NativeKernels, NativeObject, native_for
from torchlamp.simulation.statistics import Statistics

#: Decoder layers of transformers with RMSNorms, rotary positions over the whole head and a gated MLP; the value is what
#: their norms add to the weight (Gemma's multiply by 1 + w).
KNOWN = {
    "LlamaDecoderLayer": 0.0,
    "MistralDecoderLayer": 0.0,
    "Qwen2DecoderLayer": 0.0,
    "Qwen3DecoderLayer": 0.0,
    "Gemma3DecoderLayer": 1.0,
}
#: Models of transformers that hand hidden states from layer to layer untouched.
PLAIN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Gemma3TextModel")


class LayerDecode(Forward):
    """A decoder layer for single tokens with a look-ahead cache; the layer's own forward for everything else."""

    def __init__(
        self,
        module: nn.Module,
        qkv: LinearsDecode,
        out: LinearsDecode,
        mlp: MlpDecode,
        statistics: Statistics,
    ) -> None:
        super().__init__(module)
        self.qkv, self.out, self.mlp, self.statistics = qkv, out, mlp, statistics
        attention: Any = module.self_attn
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
        angles: Any = kwargs.get("position_embeddings")
        native = native_for()
        fast = (
            not args
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
        mask = kwargs.get("attention_mask")
        if mask is not None:
            keys = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0, 0]
            mask = keys.expand(batch, -1).contiguous().view(torch.uint8)
        result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        x, y = hidden_states.detach().reshape(batch, -1).contiguous().numpy(), result.view(batch, -1).numpy()
        threads, record = torch.get_num_threads(), self.statistics.record
        for layer in self._together(cache):
            part = cache.layers[layer.number]
            store, first = part.store, part.first(1, coming=1)
            scores, values, seen, neurons, columns, said = layer.kernel(native).step(
                x, cosines, sines, store.kernel(native), store.length, first, mask, layer.scaling,
                part.scores.threshold, part.values_settings.threshold, store.strange, y, threads,
            )  # fmt: skip
            part.appended(said)
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
        return vars(module).get("forward") is self and not (
            module._forward_hooks or module._forward_pre_hooks
        )

    def kernel(self, native: NativeKernels) -> Any:
        """The native object over the layer's copies and weights."""
        return self._native.get(native, self._make)

    def _make(self, native: NativeKernels) -> Any:
        layer, attention, plus = self.module, self.attention, KNOWN[type(self.module).__name__]
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
    """Whether a layer is one of `KNOWN`, with rotary positions over its whole heads."""
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    partial = getattr(config, "partial_rotary_factor", None)
    return type(layer).__name__ in KNOWN and partial in (None, 1, 1.0)


def chain(model: Any, layers: Sequence[LayerDecode]) -> None:
    """Tell layers of a model which others follow them with the same mask and positions."""
    if type(model.get_decoder()).__name__ not in PLAIN:
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
