"""Contestants of `torchlamp bench decode`: ways to decode one token after the other, with one interface."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchlamp.huggingface.sharing_copy import sharing_copy


class Decoder(Protocol):
    """Reads a prompt, then takes one token at a time."""

    def prefill(self, tokens: Tensor) -> None:
        """Read int64 (length,) tokens."""

    def step(self, token: int) -> Tensor:
        """Read one token more; float32 logits (vocabulary,) of what follows it."""

    def close(self) -> None:
        """Free its memory."""


class TransformersDecoder:
    """A transformers model with a cache; `make_cache` None takes the model's own DynamicCache."""

    def __init__(self, model: Any, make_cache: Callable[[], Any] | None = None) -> None:
        self.model, self.make_cache = model, make_cache
        self._cache: Any = None

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> None:
        """Read int64 (length,) tokens."""
        cache = None if self.make_cache is None else self.make_cache()
        output = self.model(tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Read one token more; float32 logits (vocabulary,)."""
        output = self.model(torch.tensor([[token]]), past_key_values=self._cache, use_cache=True)
        logits: Tensor = output.logits[0, 0]
        return logits

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (length, vocabulary) of int64 (length,) tokens, in the model's dtype, with an empty cache."""
        cache = None if self.make_cache is None else self.make_cache()
        logits: Tensor = self.model(tokens[None], past_key_values=cache, use_cache=True).logits[0]
        return logits

    def close(self) -> None:
        """Forget the cache."""
        self._cache = None


class PreparedDecoder(TransformersDecoder):
    """A model under `torchlamp.prepare`, on the same weights as the model it was made from."""

    def __init__(self, model: Any, policy: Any, **options: Any) -> None:
        from torchlamp.huggingface.prepare import prepare

        self.prepared = prepare(sharing_copy(model), policy, **options)
        attention = "scores" in self.prepared.policy.sites
        super().__init__(self.prepared.model, self.prepared.cache if attention else None)

    def prefill(self, tokens: Tensor) -> None:
        """Read int64 (length,) tokens; counts start anew."""
        super().prefill(tokens)
        self.prepared.statistics.reset()


class ExactDecoder(TransformersDecoder):
    """A model under ``prepare(exact=True)``: its own calls are float32's, so its texts are what is timed."""

    def __init__(self, model: Any) -> None:
        from torchlamp.huggingface.prepare import prepare

        self.prepared = prepare(model, exact=True)
        super().__init__(model)
        self._warm = False

    def text_rate(self, prompt: Tensor, count: int) -> float:
        """New tokens a second of greedy text behind int64 (length,) tokens, once the first one is there."""
        if not self._warm:  # the first text measures how much checks differ
            self._seconds(prompt, 16)
            self._warm = True
        first = self._seconds(prompt, 1)
        return count / max(self._seconds(prompt, count + 1) - first, 1e-9)

    @torch.inference_mode()
    def _seconds(self, prompt: Tensor, count: int) -> float:
        start = time.perf_counter()
        self.model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
        return time.perf_counter() - start


def dynamic_int8(model: nn.Module) -> Any:
    """A copy of a model with torch's dynamic int8 linear layers: 8-bit weights and activations, per tensor."""
    import warnings

    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to move to another package
        quantised: Any = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    return quantised
