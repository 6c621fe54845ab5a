"""A whole decoder for one token of each sequence: its layers in native calls, one after the other.

The embedding, the rotary angles and the masks are the model's own modules and transformers' functions;
what the models of `decode_layer.DECODERS` do between them, nothing, is known by their class.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from torchlamp.huggingface.decode_layer import NativeLayer, norm_formula
from torchlamp.huggingface.file_weights import FileWeights
from torchlamp.huggingface.lookahead_cache import NAME, LookaheadCache
from torchlamp.huggingface.masks import seen_keys
from torchlamp.huggingface.plain_modules import PlainModules
from torchlamp.huggingface.site_forwards import Forward
from torchlamp.kernels.dispatch import NativeKernels, native_for
from torchlamp.simulation.statistics import Statistics

FULL, SLIDING = "full_attention", "sliding_attention"
_MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


class StepDecode(Forward):
    """A decoder's forward for steps of one token with a look-ahead cache; its own, module by module, for all else."""

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
            and given.shape[1] == 1
            and self._is_step(past_key_values, attention_mask, kwargs)
        ):
            model: Any = self.module
            x = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            if position_ids is None:
                position_ids = torch.full((1, 1), past_key_values.get_seq_length())
            masks = self._masks(x, attention_mask, past_key_values, position_ids)
            seen = {kind: None if mask is None else seen_keys(mask) for kind, mask in masks.items()}
            known = all(mask is None or seen[kind] is not None for kind, mask in masks.items())
            if known and x.dtype == torch.float32 and x.device.type == "cpu":
                angles = self._angles(x, position_ids, masks)
                hidden = self._run(native, past_key_values, x, seen, angles)
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

    def _is_step(self, cache: LookaheadCache, mask: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether nobody could tell that the layers' modules don't run, and the cache takes one more token as it is."""
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
            and all(layer.has_room() for layer in cache.layers)
            and self.inside.hold()
        )

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

    def _run(
        self,
        native: NativeKernels,
        cache: LookaheadCache,
        x: Tensor,
        seen: Mapping[str, Tensor | None],
        angles: Mapping[str, tuple[Any, Any]],
    ) -> Tensor:
        """Hidden states float32 (batch, 1, size) through all layers and the final norm."""
        batch = len(x)
        masks = {
            kind: None if keys is None else keys[:, 0].expand(batch, -1).contiguous().view(torch.uint8)
            for kind, keys in seen.items()
        }
        result = torch.empty(x.shape)
        now, y = x.detach().reshape(batch, -1).contiguous().numpy(), result.view(batch, -1).numpy()
        threads, record = torch.get_num_threads(), self.statistics.record
        for layer, kind in zip(self.layers, self._kinds(), strict=True):
            part, (cosines, sines) = cache.layers[layer.number], angles[kind]
            store, first = part.store, part.first(1, coming=1)
            scores, values, keys, neurons, columns, flags = layer.kernel(native).step(
                now, cosines, sines, store.kernel(native), store.length, first, masks[kind], layer.scaling,
                part.scores.threshold, part.values_settings.threshold, store.has_nonfinite_values, y, threads,
            )  # fmt: skip
            part.appended(flags)
            record("scores", layer.number, scores, keys * layer.heads)
            record("values", layer.number, values, keys * layer.kv_heads)
            layer.mlp.note_rows(2 * neurons)
            record("mlp_up", layer.number, neurons, batch * layer.mlp.mlp.gate.rows)
            record("mlp_down", layer.number, columns, batch * layer.mlp.mlp.gate.rows)
            now = y
        native.extension.rms_norm(native.instruction_set, y, self.norm_weight, self.norm_eps, y)
        return result

    def _returns_cache(self, use_cache: bool | None) -> bool:
        if self.family in ("llama", "gemma3"):
            return True
        return bool(self.module.config.use_cache if use_cache is None else use_cache)  # type: ignore[union-attr]
