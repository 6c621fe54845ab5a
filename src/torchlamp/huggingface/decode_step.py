"""A whole decoder for steps and prompts: its layers in native calls, one after the other.

The embedding, the rotary angles and the masks are the model's own modules and transformers' functions;
what the models of `decode_layer.DECODERS` do between them, nothing, is known by their class.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from torchlamp.huggingface.decode_attention import decode_attention
from torchlamp.huggingface.decode_layer import NativeLayer, norm_formula
from torchlamp.huggingface.file_weights import FileWeights
from torchlamp.huggingface.lookahead_cache import NAME, LookaheadCache
from torchlamp.huggingface.masks import seen_keys
from torchlamp.huggingface.plain_modules import PlainModules
from torchlamp.huggingface.site_forwards import Forward
from torchlamp.kernels.dispatch import NativeKernels, native_for
from torchlamp.kernels.low_bit_matrix import serves_many
from torchlamp.simulation.statistics import Statistics

FULL, SLIDING = "full_attention", "sliding_attention"
_MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


class StepDecode(Forward):
    """A decoder's forward for tokens that go to a look-ahead cache; its own, module by module, for all else.

    A step (`LookaheadLayer.is_step`) is one call a layer. A prompt is two, around the attention of `decode_attention`,
    which is in float32.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[NativeLayer],
        forwards: Mapping[nn.Module, Forward],
        statistics: Statistics,
        weights: FileWeights | None = None,
    ) -> None:
        super().__init__(decoder)
        self.layers, self.statistics = list(layers), statistics
        #: Where the model's own weights stay in their file: let go after whatever isn't a step.
        self.weights = weights
        model: Any = decoder
        called = (model.embed_tokens, model.rotary_emb)
        self.inside = PlainModules(decoder, forwards, called=called, captures=False)
        self.family = layers[0].family
        self.norm_weight, self.norm_eps = norm_formula(model.norm, layers[0].family)

    def run_(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The step, or the decoder's own forward; arguments as the models of `DECODERS` order them."""
        native = native_for()
        given = input_ids if inputs_embeds is None else inputs_embeds
        if (
            native is not None
            and isinstance(past_key_values, LookaheadCache)
            and given is not None
            and (input_ids is None or inputs_embeds is None)
            and given.ndim >= 2
            and self._is_plain(past_key_values, attention_mask, kwargs)
            and self._fits(past_key_values, given.shape[1])
        ):
            model: Any = self.module
            x = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            if position_ids is None:
                before = past_key_values.get_seq_length()
                position_ids = torch.arange(before, before + x.shape[1])[None]
            masks = self._masks(x, attention_mask, past_key_values, position_ids)
            seen = {kind: None if mask is None else seen_keys(mask) for kind, mask in masks.items()}
            known = all(mask is None or seen[kind] is not None for kind, mask in masks.items())
            if known and x.dtype == torch.float32 and x.device.type == "cpu":
                angles = self._angles(x, position_ids, masks)
                step = _is_step(past_key_values, x.shape[1])
                run = self._step if step else self._prompt
                hidden = run(native, past_key_values, x, seen if step else masks, angles)
                if self.weights is not None and not step:
                    self.weights.settle()
                kept = past_key_values if self._returns_cache(use_cache) else None
                return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=kept)
            # The embedding's hooks have run: its output goes on.
            input_ids, inputs_embeds = None, x
        output = self.original(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if self.weights is not None:
            self.weights.settle()
        return output

    def _is_plain(self, cache: LookaheadCache, mask: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether nobody could tell that the layers' modules don't run."""
        model: Any = self.module
        config = model.config
        others = [value for name, value in kwargs.items() if name != "return_dict"]
        return (
            kwargs.get("return_dict", config.return_dict) is not False
            and self.own is None
            and not torch.is_grad_enabled()
            and not model.training
            and not torch.is_autocast_enabled("cpu")
            and all(value is None or value is False for value in others)
            and not config.output_hidden_states
            and not config.output_attentions
            and getattr(config, "is_causal", None) in (None, True)
            and not getattr(config, "use_bidirectional_attention", None)
            and config._attn_implementation == NAME
            and not (isinstance(mask, dict) and self.family in ("llama", "mistral"))
            and config.num_hidden_layers == len(self.layers) == len(cache.layers)
            and self.inside.hold()
        )

    def _fits(self, cache: LookaheadCache, count: int) -> bool:
        """Whether so many tokens are a step or a prompt that is served; a cache that must change is made ready."""
        if count == 0 or (count > 1 and not serves_many()):
            return False
        if _is_step(cache, count):
            if any(layer.store.length == 0 for layer in cache.layers):
                return False
            before = cache.layers[0].store.capacity
            for layer in cache.layers:
                layer.make_room(count)
            if self.weights is not None and cache.layers[0].store.capacity != before:
                self.weights.settle()  # of the memory that the stores had before
        return True

    def _kinds(self) -> Sequence[str]:
        """Of each layer's attention, as the model's forward chooses masks."""
        config: Any = self.module.config
        if self.family in ("llama", "mistral"):
            sliding = self.family == "mistral" and config.sliding_window is not None
            return [SLIDING if sliding else FULL] * len(self.layers)
        kinds: Sequence[str] = config.layer_types
        return kinds

    def _masks(self, x: Tensor, mask: Any, cache: LookaheadCache, positions: Tensor) -> dict[str, Any]:
        """Each kind's mask, made as the model makes it."""
        kinds = set(self._kinds())
        if isinstance(mask, dict):
            return {kind: mask[kind] for kind in kinds}
        return {
            kind: _MASKS[kind](
                config=self.module.config,
                inputs_embeds=x,
                attention_mask=mask,
                past_key_values=cache,
                position_ids=positions,
            )
            for kind in kinds
        }

    def _angles(self, x: Tensor, positions: Tensor, kinds: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Each kind's cosines and sines as arrays (batch or 1, size)."""
        rotary: Any = self.module.rotary_emb
        own = self.family == "gemma3"  # whose kinds turn at different speeds
        pairs = {kind: rotary(x, positions, kind) for kind in kinds} if own else None
        shared = None if own else rotary(x, position_ids=positions)
        size = self.layers[0].size

        def arrays(pair: Any) -> tuple[Any, Any]:
            cosines, sines = (a.detach().float().reshape(-1, size).contiguous().numpy() for a in pair)
            return cosines, sines

        return {kind: arrays(pairs[kind] if pairs is not None else shared) for kind in kinds}

    def _step(
        self,
        native: NativeKernels,
        cache: LookaheadCache,
        x: Tensor,
        seen: Mapping[str, Tensor | None],
        angles: Mapping[str, tuple[Any, Any]],
    ) -> Tensor:
        """Hidden states float32 (batch, count, size) of a step through all layers and the final norm."""
        batch, count, _ = x.shape
        masks = {
            kind: None if keys is None else keys.expand(batch, -1, -1).contiguous().view(torch.uint8).numpy()
            for kind, keys in seen.items()
        }
        result, (now, y) = _buffers(x)
        threads, record = torch.get_num_threads(), self.statistics.record
        for layer, kind in zip(self.layers, self._kinds(), strict=True):
            part, (cosines, sines) = cache.layers[layer.number], angles[kind]
            store, first = part.store, part.first(count, coming=count)
            scores, values, keys, neurons, columns, flags = layer.kernel(native).step(
                now, cosines, sines, store.kernel(native), store.length, first, masks[kind], layer.scaling,
                part.scores.threshold, part.values_settings.threshold, store.has_nonfinite_values, y, threads,
            )  # fmt: skip
            part.appended(count, flags)
            record("scores", layer.number, scores, keys * layer.heads)
            record("values", layer.number, values, keys * layer.kv_heads)
            self._record_mlp(layer, len(now), neurons, columns)
            now = y
        return self._normed(native, result, y)

    def _prompt(
        self,
        native: NativeKernels,
        cache: LookaheadCache,
        x: Tensor,
        masks: Mapping[str, Tensor | None],
        angles: Mapping[str, tuple[Any, Any]],
    ) -> Tensor:
        """The same of a prompt, whose attention is in float32."""
        batch, count, _ = x.shape
        result, (now, y) = _buffers(x)
        threads = torch.get_num_threads()
        for layer, kind in zip(self.layers, self._kinds(), strict=True):
            # q: [batch, count, heads, size]; k, v: [batch, count, key heads, size]
            q, k, v = (
                torch.empty(batch, count, heads, layer.size)
                for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
            )
            kernel, flat = layer.kernel(native), [a.flatten(0, 1).numpy() for a in (q, k, v)]
            kernel.begin(now, *angles[kind], *flat, threads)
            keys, values = cache.layers[layer.number].update(k.transpose(1, 2), v.transpose(1, 2))
            attended, _ = decode_attention(
                layer.attention, q.transpose(1, 2), keys, values, masks[kind], scaling=layer.scaling
            )
            rows = attended.reshape(batch * count, -1).contiguous().numpy()
            self._record_mlp(layer, len(now), *kernel.end(now, rows, y, threads))
            now = y
        return self._normed(native, result, y)

    def _record_mlp(self, layer: NativeLayer, tokens: int, neurons: int, columns: int) -> None:
        layer.mlp.note_rows(2 * neurons + columns)
        eligible = tokens * layer.mlp.mlp.gate.rows
        self.statistics.record("mlp_up", layer.number, neurons, eligible)
        self.statistics.record("mlp_down", layer.number, columns, eligible)

    def _normed(self, native: NativeKernels, result: Tensor, y: Any) -> Tensor:
        """`result`, whose memory y (tokens, size) is, after the final norm."""
        native.extension.rms_norm(native.instruction_set, y, self.norm_weight, self.norm_eps, y)
        return result

    def _returns_cache(self, use_cache: bool | None) -> bool:
        if self.family in ("llama", "gemma3"):
            return True
        return bool(self.module.config.use_cache if use_cache is None else use_cache)  # type: ignore[union-attr]


def _is_step(cache: LookaheadCache, count: int) -> bool:
    """Whether so many tokens are a step for every layer of a cache."""
    return all(layer.is_step(count, layer.store.length) for layer in cache.layers)


def _buffers(x: Tensor) -> tuple[Tensor, tuple[Any, Any]]:
    """A result like x (batch, count, size), and the memory of both as arrays (batch * count, size)."""
    result, size = torch.empty(x.shape), x.shape[2]
    return result, (x.detach().reshape(-1, size).contiguous().numpy(), result.view(-1, size).numpy())
