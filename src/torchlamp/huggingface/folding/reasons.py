"""What of a policy's transforms can pass into a model's weights, and why the rest can't."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from torchlamp.huggingface.folding.parts import Attention, bias_of
from torchlamp.huggingface.folding.stream import Stream
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.sites import SITES

_ONE_BY_ONE = "the activation in front of it works on each number by itself"
_DIAGONAL = "the norm in front of it scales each channel by itself"
_A_SUM_A_KEY = "weights have no place for the float32 sum that each key adds to its scores"
_PAIRS = "rotary positions turn pairs of numbers, and only a pair's own turn and factor commute with that"


@dataclass(frozen=True)
class Anatomy:
    """What decides which transforms pass through a model."""

    model: PreTrainedModel
    sites: Sites

    @cached_property
    def attentions(self) -> list[Attention]:
        """The attention of each layer."""
        return [Attention.of(self.sites, layer) for layer in self.sites.layers]

    @cached_property
    def positions(self) -> str:
        """How heads know positions: "none" (from the embedding), "halves" (rotary, x_i with x_(i + size / 2)), "?"."""
        decoder, attention = self.model.get_decoder(), self.attentions[0].module
        if getattr(decoder, "wpe", None) is not None:
            return "none"
        turn = getattr(sys.modules.get(type(attention).__module__), "rotate_half", None)
        config = self.model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        partial = getattr(config, "partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0))
        if turn is None or partial not in (None, 1.0):
            return "?"
        size = self.attentions[0].size
        halves = torch.arange(size) + 1.0
        expected = torch.cat([-halves[size // 2 :], halves[: size // 2]])
        return "halves" if torch.equal(turn(halves), expected) else "?"

    @cached_property
    def tied(self) -> bool:
        """Whether the LM head's weight is the embedding's."""
        head, _ = self.sites.lm_head()
        return head.weight is self.model.get_input_embeddings().weight

    @cached_property
    def may_have_attention_bias(self) -> bool:
        """Whether the model's class gives its projections biases when the configuration asks for them."""
        config = self.model.config.get_text_config()
        if getattr(config, "attention_bias", None) is not False or self.model.config is not config:
            return False
        asking = copy.deepcopy(config)
        asking.attention_bias = True
        with torch.device("meta"):
            names = type(self.model)(asking).state_dict()
        return {name for name in names if name.endswith("o_proj.bias")} != set()

    @cached_property
    def unknown_in_stream(self) -> list[str]:
        """Parameters that an order of the residual stream doesn't know."""
        inner = [norm.module for a in self.attentions for norm in a.norms or ()]
        return Stream(self.model, self.sites).unknown(inner)

    def reason(self, site: str, transform: str) -> str | None:
        """Why a transform of a site can't pass into the weights; None: it can."""
        if transform == "headwise":
            return (
                "query heads share the weights of their keys"
                if site == "scores"
                else "it changes nothing here"
            )
        if transform == "bicenter":
            return _A_SUM_A_KEY if site == "scores" else "here it is 'center', which may be folded: name that"
        if site == "scores":
            return self._scores(transform)
        if site == "attention_out":
            return self._attention_out(transform)
        if site == "mlp_down":
            return self._mlp_down(transform)
        return self._reader(site, transform)

    def _scores(self, transform: str) -> str | None:
        first = self.attentions[0]
        if first.unknown:
            return f"the attention has parameters that folding doesn't know: {', '.join(first.unknown)}"
        if self.positions == "?":
            return "how this model turns queries and keys by their positions isn't known"
        if transform == "center":
            if self.positions != "none":
                return "rotary positions turn a key's bias with its place, and the keys' mean has none"
            if getattr(self.model.config.get_text_config(), "attn_logit_softcapping", None):
                return "a softcap sees the shift that the mean makes"
            return None if first.key.bias is not None else "the keys have no bias that could take the mean"
        if self.positions == "halves":
            if transform == "hadamard":
                return _PAIRS
            if transform == "balance" and first.norms is not None:
                return "norms whose weights all heads share come between the projections and the turns"
        elif first.norms is not None:
            return "norms whose weights all heads share follow the projections"
        return None

    def _attention_out(self, transform: str) -> str | None:
        first = self.attentions[0]
        if first.unknown:
            return f"the attention has parameters that folding doesn't know: {', '.join(first.unknown)}"
        biases = first.value.bias is not None and bias_of(first.out) is not None
        if transform == "center" and not biases and not self.may_have_attention_bias:
            return "values and output projection have no biases that could take the mean"
        return None

    def _mlp_down(self, transform: str) -> str | None:
        if transform == "center":
            return f"{_ONE_BY_ONE} and adds no bias"
        if transform in ("balance", "hadamard"):
            return _ONE_BY_ONE
        is_gated = self.sites.is_gated(self.sites.layers[0])
        return f"{_ONE_BY_ONE} and isn't linear" if transform == "smooth" and not is_gated else None

    def _reader(self, site: str, transform: str) -> str | None:
        if transform in ("balance", "hadamard"):
            return _DIAGONAL
        if transform == "center":
            norm, readers = self.readers(site)[0]
            if bias_of(norm) is None:
                return "the norm in front of it has no bias that could take the mean"
            return (
                None
                if all(bias_of(r) is not None for r in readers)
                else "it has no bias for the mean's product"
            )
        if transform == "smooth" and site == "lm_head" and self.tied:
            return "its weight is the embedding's, whose scale must stay"
        if transform == "sort" and self.unknown_in_stream:
            return (
                "parameters that the order of the residual stream doesn't know: "
                f"{', '.join(self.unknown_in_stream[:3])}"
            )
        return None

    def readers(self, site: str) -> list[tuple[nn.Module, Sequence[nn.Module]]]:
        """The norms of a site, each with the linear layers that read it."""
        if site == "lm_head":
            return [(self.sites.final_norm(), [self.sites.lm_head()[0]])]
        if site == "qkv":
            return [
                (self.sites.norms(x).attention[1], self.sites.modules(SITES["qkv"], x))
                for x in self.sites.layers
            ]
        return [
            (self.sites.norms(x).mlp[1], self.sites.modules(SITES["mlp_up"], x)) for x in self.sites.layers
        ]
