"""`generate` of a model under ``prepare(exact=True)``: float32's own text, drafted from low-bit copies."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

from torchlamp.huggingface.exact_model import ExactModel, holds_plain
from torchlamp.huggingface.exact_text import ExactText

logger = logging.getLogger("torchlamp.decoding")
_GENERATE = "generate"
#: Arguments of the model's forward that a text may have.
_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
#: Processors that keep a state from call to call, which drafts would disturb.
_STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
_SIGNATURE = inspect.signature(GenerationMixin.generate)


@dataclass(eq=False)
class ExactGenerate:
    """A model's `generate` in the place of its class's; texts that can't be drafted are the class's own, in float32.

    transformers takes a way of decoding (`custom_generate`) as an argument of each call, and has no place where a model
    says it for all; this hands it over. Takes `generator`, a torch.Generator for samples, beside the usual arguments.
    """

    both: ExactModel
    #: What `prepare` returned.
    prepared: Any = None
    #: The `generate` that the instance had of its own; None: its class's.
    own: Callable[..., Any] | None = None
    _undone: bool = field(default=False, repr=False)

    def put(self) -> None:
        """Put it in place."""
        self.own = vars(self.both.model).get(_GENERATE)
        setattr(self.both.model, _GENERATE, self)

    def undo(self) -> None:
        """Give the model its own back; a second call does nothing."""
        if self._undone:
            return
        self._undone = True
        if self.own is None:
            delattr(self.both.model, _GENERATE)
        else:
            setattr(self.both.model, _GENERATE, self.own)

    def __call__(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        """As transformers' `generate`."""
        model = self.both.model
        given = _SIGNATURE.bind_partial(model, *args, **kwargs).arguments
        generate = self.own or getattr(type(model), _GENERATE).__get__(model)
        others = [name for name in ("custom_generate", "assistant_model") if given.get(name) is not None]
        if others:
            _warn(f"{others[0]} is given")
            return generate(*args, **kwargs)
        return generate(
            *args, **kwargs, custom_generate=_Decoding(self.both, given.get("streamer"), generator)
        )


@dataclass(frozen=True, eq=False)
class _Decoding:
    """What `generate` calls once it has read its arguments."""

    both: ExactModel
    #: `generate` hands no streamer to a way of decoding that it doesn't know.
    streamer: Any
    generator: torch.Generator | None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        mode = generation_config.get_generation_mode(None)
        reason = _why_not(mode, input_ids, logits_processor, generation_config, model_kwargs)
        if reason is not None:
            _warn(reason)
            own = getattr(type(model), GENERATION_MODES_MAPPING[mode])
            return own(
                model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
                generation_config=generation_config, streamer=self.streamer, **model_kwargs,
            )  # fmt: skip
        text = ExactText(
            self.both, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs,
            self.streamer, self.generator,
        )  # fmt: skip
        with model._optimize_model_for_decode():
            text.run()
        if self.streamer is not None:
            self.streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=text.ids, past_key_values=text.cache)
        return text.ids


def _why_not(mode: Any, ids: Tensor, processors: Any, config: Any, given: dict[str, Any]) -> str | None:
    """Why a text can't be drafted; None: it can."""
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value.replace('_', ' ')} is asked for"
    if len(ids) > 1:
        return f"the batch has {len(ids)} sequences"
    if not given.get("use_cache") or not holds_plain(given.get("past_key_values")):
        return f"the cache is {type(given.get('past_key_values')).__name__}, not DynamicCache"
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if wanted := [name for name in asked if getattr(config, name, None)]:
        return f"{wanted[0]} is asked for"
    if other := [name for name, value in given.items() if value is not None and name not in _ARGUMENTS]:
        return f"{other[0]} is given"
    if stateful := [type(p).__name__ for p in processors if type(p).__name__ in _STATEFUL]:
        return f"{stateful[0]} keeps a state"
    return None


def _warn(reason: str) -> None:
    logger.warning("exact: %s, so the text is decoded by float32 steps alone, no faster than without", reason)


def exact_generate(model: Any) -> ExactGenerate | None:
    """The `ExactGenerate` of a model, if it is prepared so."""
    own = vars(model).get(_GENERATE)
    return own if isinstance(own, ExactGenerate) else None
