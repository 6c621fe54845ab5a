"""Queries, keys and values that a real model makes on real text, as many as a long context has."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from torchlamp.data.text import Text, code_text, cut_windows, default_text

_PIECE = 2048


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
    """Queries, keys and values of some layers of a Llama-type model after so many tokens of prose and code.

    The text is read in windows of 2048 tokens, each from position 0, and their keys are joined: the last window's query
    sees its own window and, as a model with a long context does, much text before it.
    """
    mixed = Text("prose and code", default_text().content + "\n\n" + code_text().content)
    windows = cut_windows(tokenizer, [mixed], -(-keys // _PIECE), _PIECE)
    queries: dict[int, Tensor] = {}
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in layers}
    hooks = [_note_query(model.model.layers[number].self_attn, queries, number) for number in layers]
    try:
        for window in windows:
            cache = DynamicCache()
            angles: Any = model.model.rotary_emb(torch.zeros(1), torch.arange(_PIECE)[None])
            model.model(window[None], past_key_values=cache, use_cache=True)
            for number in layers:
                parts[number].append((cache.layers[number].keys, cache.layers[number].values))
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for number in layers:
        attention = model.model.layers[number].self_attn
        q = attention.q_proj(queries[number][:, -1:]).view(1, 1, -1, attention.head_dim).transpose(1, 2)
        cosines, sines = (angle[:, -1:, None].transpose(1, 2) for angle in angles)
        first, second = q.chunk(2, -1)
        q = q * cosines + torch.cat([-second, first], -1) * sines
        k, v = (torch.cat([part[i] for part in parts[number]], 2)[:, :, -keys:] for i in (0, 1))
        found.append(HeadTensors(q.contiguous(), k.contiguous(), v.contiguous()))
    return found


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


def _note_query(attention: Any, queries: dict[int, Tensor], number: int) -> Any:
    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        queries[number] = kwargs["hidden_states"]

    return attention.register_forward_pre_hook(note, with_kwargs=True)
