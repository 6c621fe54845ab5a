"""From scores to probabilities: softcap, bias, hidden keys and attention sinks, in plain float32."""

import math

import torch
from torch import Tensor


def capped_logits(scores: Tensor, softcap: float | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What enters the softmax, c tanh(score / c) + bias, and its derivative by the score.

    Parameters
    ----------
    scores
        float32 (heads, rows, keys).
    softcap
        c > 0, or None for none.
    bias
        float32 (heads or 1, rows, keys), or None.

    Returns
    -------
    Logits and slope, float32 (heads, rows, keys); the slope is None where it is 1 everywhere.
    """
    slope = None
    logits = scores
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        slope = 1 - capped * capped
        logits = capped.mul_(softcap)
    if bias is not None:
        logits = logits + bias
    return logits, slope


def visible_softmax(logits: Tensor, hidden: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Softmax over visible keys and the sink; 0 at hidden keys, and everywhere in rows that see nothing.

    Parameters
    ----------
    logits
        float32 (heads, rows, keys); not written to.
    hidden
        bool (heads or 1, rows, keys), True where a row doesn't see the key; None: every row sees every key.
    sinks
        float32 (heads,): a logit per head that enters the normaliser only; or None.

    Returns
    -------
    float32 (heads, rows, keys).
    """
    weights = logits.clone() if hidden is None else logits.masked_fill(hidden, -math.inf)
    top = weights.amax(dim=-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.view(-1, 1, 1))
    if hidden is not None:
        blind = hidden.all(dim=-1, keepdim=True)
        top = top.masked_fill(blind, 0.0)
    weights.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total += torch.exp(sinks.view(-1, 1, 1) - top)
    if hidden is not None:
        total = total.masked_fill(blind, 1.0)
    return weights.div_(total)
