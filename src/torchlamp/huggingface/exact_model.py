"""The two models of exact decoding: one that drafts from low-bit copies, and the model itself, which decides."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from torchlamp.huggingface.decode_forwards import HeadDecode
from torchlamp.huggingface.draft_length import Acceptance
from torchlamp.huggingface.lookahead_cache import LookaheadCache
from torchlamp.huggingface.site_forwards import own_forward, set_forward


class ExactModel:
    """A model, and a copy of it on the same weights that was prepared for low-bit decoding.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Runs its own forwards in float32.
    draft : Prepared
        The other one.
    head : HeadDecode, optional
        The LM head of the model from the draft's low-bit copy; its two largest logits are provably those of float32.
        None: checks compute all logits in full.
    """

    def __init__(self, model: Any, draft: Any, head: HeadDecode | None) -> None:
        self.model, self.draft, self.head = model, draft, head
        self.acceptance = Acceptance()

    def draft_cache(self, cache: DynamicCache) -> Any:
        """A cache of the drafting model that holds what the model's own holds."""
        if "scores" in self.draft.settings:
            made: Any = self.draft.cache()
            made.take(cache)
        else:
            made = copy.copy(cache)
            made.layers = state(cache)
        made.activate_past_recording()
        return made

    @contextmanager
    def low_bit_head(self, wanted: bool) -> Iterator[None]:
        """A block in which the model's logits come from the low-bit head, the two largest of them exactly."""
        if not wanted or self.head is None:
            yield
            return
        before = own_forward(self.head.module)
        set_forward(self.head.module, self.head)
        try:
            yield
        finally:
            set_forward(self.head.module, before)

    @property
    def bound(self) -> float | None:
        """Two scores of a check closer than this may stand the other way round in single steps; None: not known yet.

        Eight times the largest difference of a logit that was measured: a difference of two logits moves by at most
        twice as much, and the rest is a margin of four for texts on which nothing was measured.
        """
        found = self.acceptance.difference
        return None if found == 0.0 else 8 * found

    def note_difference(self, checked: Tensor, single: Tensor) -> None:
        """Logits of the same position in a check and in a single step."""
        finite = checked.isfinite() & single.isfinite()
        found = float((checked - single)[finite].abs().max()) if bool(finite.any()) else 0.0
        # Two equal sums are no proof that others are: at least a float32 unit of the largest logit is allowed for.
        unit = float(single[finite].abs().max()) * 2.0**-22 if bool(finite.any()) else 0.0
        self.acceptance.difference = max(self.acceptance.difference, found, unit, math.ulp(0.0))


def holds_plain(cache: Any) -> bool:
    """Whether a cache is one whose layers are never changed in place, so that `state` is a copy of it."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def state(cache: DynamicCache) -> list[Any]:
    """The layers of a cache as they are now; they share tensors, which a cache replaces and doesn't change."""
    return [copy.copy(layer) for layer in cache.layers]


def put_state(cache: DynamicCache, layers: list[Any], *, record_past: bool) -> None:
    """Have a cache hold what it held when `state` was called."""
    cache.layers = [copy.copy(layer) for layer in layers]
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = record_past


def crop_to(cache: DynamicCache | LookaheadCache, length: int) -> None:
    """Forget the tokens after the first `length`."""
    removed = cache.get_seq_length() - length
    if removed >= 0:
        for layer in cache.layers:
            layer.crop(-removed)


@torch.no_grad()
def last_logits(model: Any, cache: Any, ids: Tensor, count: int, given: dict[str, Any], more: int) -> Tensor:
    """Logits float32 (count, vocabulary) after each of the last `count` of `ids`, which `cache` takes.

    `given` are the arguments that `generate` made for the prompt, of which `ids` has `more` tokens more.
    """
    arguments = {**given, "past_key_values": cache}
    if (mask := given.get("attention_mask")) is not None:
        arguments["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), more)], -1)
    if (positions := given.get("position_ids")) is not None:
        new = torch.arange(1, more + 1, dtype=positions.dtype).expand(*positions.shape[:-1], more)
        arguments["position_ids"] = torch.cat([positions, positions[..., -1:] + new], -1)
    if "logits_to_keep" in given:
        arguments["logits_to_keep"] = count
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=count, **arguments)
    logits: Tensor = model(**inputs, return_dict=True).logits[0, -count:].float()
    return logits
