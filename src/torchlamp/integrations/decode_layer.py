"""A whole decoder layer of a prepared model in one native call.

Modules one by one cost some fifty small operations a layer, a third of a token's time at the size of SmolLM2. Layers
whose formula is known by their class take this way when all their sites are low-bit; the numbers are those of the
modules' own kernels, up to float32 rounding in norms and rotary positions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from torchlamp.compositions.decode_statistics import DecodeStatistics
from torchlamp.integrations.decode_forwards import LinearsDecode, MlpDecode
from torchlamp.integrations.lookahead_cache import LookaheadCache
from torchlamp.integrations.site_forwards import Forward
from torchlamp.kernels import native

#: Decoder layers of transformers with RMSNorms, rotary positions over the whole head and a gated MLP; the value is what
#: their norms add to the weight (Gemma's multiply by 1 + w).
KNOWN = {
    "LlamaDecoderLayer": 0.0,
    "MistralDecoderLayer": 0.0,
    "Qwen2DecoderLayer": 0.0,
    "Qwen3DecoderLayer": 0.0,
    "Gemma3DecoderLayer": 1.0,
}


class LayerDecode(Forward):
    """A decoder layer for single tokens with a look-ahead cache; the layer's own forward for everything else."""

    def __init__(
        self,
        module: nn.Module,
        qkv: LinearsDecode,
        out: LinearsDecode,
        mlp: MlpDecode,
        statistics: DecodeStatistics,
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
        self._native: tuple[str, Any] | None = None

    def run_(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One native call, or the layer."""
        cache: Any = kwargs.get("past_key_values")
        angles: Any = kwargs.get("position_embeddings")
        fast = (
            not args
            and hidden_states.shape[1] == 1
            and isinstance(cache, LookaheadCache)
            and angles is not None
            and hidden_states.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not kwargs.get("output_attentions")
            and native.available()
            and cache.layers[self.number].has_room()
        )
        if not fast:  # the modules one by one
            return self.original(hidden_states, *args, **kwargs)
        batch = len(hidden_states)
        cosines, sines = cache.angles_of(angles, self.size)
        part, y = (
            cache.layers[self.number],
            torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
        )
        store, first = part.store, part.first(1, coming=1)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            keys = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0, 0]
            mask = keys.expand(batch, -1).contiguous().view(torch.uint8)
        x = hidden_states.detach().reshape(batch, -1).contiguous()
        thresholds = (part.scores.threshold, part.values_storage.threshold)
        scores, values, seen, neurons, columns, said = self.kernel().step(
            x.numpy(), cosines, sines, store.kernel(), store.length, first, mask, self.scaling, *thresholds,
            store.strange, y.view(batch, -1).numpy(), torch.get_num_threads(),
        )  # fmt: skip
        part.appended(said)
        record = self.statistics.record
        record("scores", scores, seen * self.heads)
        record("values", values, seen * self.kv_heads)
        record("mlp_up", neurons, batch * self.mlp.mlp.gate.rows)
        record("mlp_down", columns, batch * self.mlp.mlp.gate.rows)
        return y

    def kernel(self) -> Any:
        """The native object, made for the instruction set in use."""
        isa = native.instruction_set()
        assert isa is not None
        made = self._native
        if made is None or made[0] != isa:
            self._native = made = (isa, self._make(isa))
        return made[1]

    def _make(self, isa: str) -> Any:
        layer, attention, plus = self.module, self.attention, KNOWN[type(self.module).__name__]
        four = hasattr(layer, "pre_feedforward_layernorm")

        def weight(owner: nn.Module, name: str) -> Tensor | None:
            norm = getattr(owner, name, None)
            return None if norm is None else (norm.weight.detach() + plus)

        second = layer.post_attention_layernorm
        return native.extension().Layer(
            isa,
            self.qkv.matrix.kernel(),
            self.out.matrix.kernel(),
            self.mlp.mlp.kernel(),
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
        return {**vars(self), "_native": None}


def can_fuse(layer: nn.Module) -> bool:
    """Whether a layer is one of `KNOWN`, with rotary positions over its whole heads."""
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    partial = getattr(config, "partial_rotary_factor", None)
    return type(layer).__name__ in KNOWN and partial in (None, 1, 1.0)
