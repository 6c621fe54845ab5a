"""Queries, keys and values that a real model makes on real text, as many as a long context has."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from torchlamp.data.text import Text, code_text, context_length, cut_windows, default_text

_PIECE = 2048
#: Of the attention that notes what it is given.
_NAME = "torchlamp_bench"


@dataclass(frozen=True)
class HeadTensors:
    """A layer's last query (1, heads, 1, size) and all its keys and values (1, key heads, keys, size), float32."""

    q: Tensor
    k: Tensor
    v: Tensor

    def first(self, keys: int) -> "HeadTensors":
        """The last so many keys, which are those nearest to the query."""
        return HeadTensors(self.q, self.k[:, :, -keys:], self.v[:, :, -keys:])


@torch.inference_mode()
def real_heads(model: Any, tokenizer: Any, keys: int, layers: list[int]) -> list[HeadTensors]:
    """Queries, keys and values of some layers of a model after so many tokens of prose and code.

    The text is read in windows of 2048 tokens, each from position 0, and their keys are joined: the last window's query
    sees its own window and, as a model with a long context does, much text before it.

    Raises
    ------
    ValueError
        A model without the attention interface, or whose context is shorter than a window.
    """
    longest = context_length(model)
    if longest is not None and longest < _PIECE:
        raise ValueError(f"a context of {longest} tokens: windows of {_PIECE} are read")
    mixed = Text("prose and code", default_text().content + "\n\n" + code_text().content)
    windows = cut_windows(tokenizer, [mixed], -(-keys // _PIECE), _PIECE)
    seen: dict[int, list[HeadTensors]] = {number: [] for number in layers}
    with _recorded(model, seen):
        for window in windows:
            model(window[None], use_cache=False, logits_to_keep=1)
    if not all(seen.values()):
        raise ValueError(f"{type(model).__name__} has no attention interface, or no layers {layers}")
    found = []
    for parts in seen.values():
        k, v = (torch.cat([getattr(part, name) for part in parts], 2)[:, :, -keys:] for name in "kv")
        found.append(HeadTensors(parts[-1].q.contiguous(), k.contiguous(), v.contiguous()))
    return found


@contextmanager
def _recorded(model: Any, seen: dict[int, list[HeadTensors]]) -> Iterator[None]:
    """Attention as `sdpa` computes it, which notes the last query, keys and values of the layers in `seen`."""

    def note(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
        if (parts := seen.get(module.layer_idx)) is not None:
            parts.append(HeadTensors(query[:, :, -1:].clone(), key.clone(), value.clone()))
        return sdpa_attention_forward(module, query, key, value, mask, **others)

    own = model.config._attn_implementation
    AttentionInterface.register(_NAME, note)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def wider(heads: list[HeadTensors], kv_heads: int, group: int) -> HeadTensors:
    """Heads of twice the size, each from two real ones: their scores are sums of two real scores, over the root of 2.

    Key heads are taken from the given layers in turn; each serves `group` queries, which are the real ones' and, where
    these are too few, the real ones' again in another order.
    """
    k = torch.cat([h.k for h in heads], 1)
    v = torch.cat([h.v for h in heads], 1)
    real = heads[0].q.shape[1] // heads[0].k.shape[1]
    q = torch.cat([h.q for h in heads], 1).view(1, -1, real, 1, heads[0].q.shape[-1])
    one, other = torch.arange(kv_heads), torch.arange(kv_heads) + kv_heads
    pick = torch.arange(group) % real
    shifted = (torch.arange(group) + torch.arange(group) // real) % real
    queries = torch.cat([q[:, one][:, :, pick], q[:, other][:, :, shifted]], -1)
    return HeadTensors(
        queries.flatten(1, 2).contiguous(),
        torch.cat([k[:, one], k[:, other]], -1).contiguous(),
        torch.cat([v[:, one], v[:, other]], -1).contiguous(),
    )
