"""Whether norms of queries and keys keep scores in the range of a narrow format.

A norm over n numbers with gains g gives vectors of at most sqrt(n) max |g|, and rotary positions don't change lengths.
So with q and k both behind one, |q.k| times the factor of the scores is bounded, whatever the input is: by Cauchy and
Schwarz, and so for partial sums, too, in exact arithmetic. With 1/sqrt(n) for the factor and equal gains the bound is
sqrt(n) max g^2, within e4m3's range of 448 for n = 128 and gains up to 6.29.

References
----------
LampAttention, arXiv 2609.39361, which asks for such norms where scores are e4m3 numbers.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

from torchlamp.huggingface.sites import Sites

#: What transformers calls these norms.
_NAMES = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
#: Length of the vectors that norms are asked with: large enough that the epsilon in them plays no part.
_LONG = 2.0**12


@torch.no_grad()
def score_bounds(model: Any) -> list[float | None]:
    """The largest score that norms of queries and keys allow in each layer; None where the layer has no such norms.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder.

    Raises
    ------
    ValueError
        A model whose layers aren't found.
    """
    sites = Sites(model)
    return [_bound(sites.attention(layer)) for layer in sites.layers]


def _bound(attention: nn.Module) -> float | None:
    """The same of one attention module."""
    for query, key in _NAMES:
        norms = [getattr(attention, name, None) for name in (query, key)]
        found = [_longest(norm) for norm in norms if isinstance(norm, nn.Module)]
        lengths = [length for length in found if length is not None]
        if len(lengths) == 2:
            scaling = getattr(attention, "scaling", None)
            size: int = getattr(attention, query).weight.numel()
            factor = 1 / math.sqrt(size) if scaling is None else float(scaling)
            return lengths[0] * lengths[1] * abs(factor)
    return None


def _longest(norm: nn.Module) -> float | None:
    """The length of the longest vector that a norm gives: of an axis, whose gain is the largest. None: no gains."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or getattr(norm, "bias", None) is not None:
        return None
    axes = _LONG * torch.eye(len(weight), device=weight.device)
    lengths: torch.Tensor = copy.deepcopy(norm).float()(axes).norm(dim=-1)
    return float(lengths.max())
