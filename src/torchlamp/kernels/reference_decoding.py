"""The readable reference of the decoding kernel: attention of new queries over low-bit copies with look-ahead.

`scores.hpp`, `values.hpp` and `attend.hpp` in `native/lowbit` are the kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.constants import SKIP, SURPRISE, VANISHED
from torchlamp.kernels.look_ahead import softmax_gain
from torchlamp.kernels.reference_lowbit import quantise_vector


def hadamard(x: Tensor) -> Tensor:
    """The last dimension, a power of two, times the Hadamard matrix over the root of its size."""
    size = x.shape[-1]
    y: Tensor = x
    half = 1
    while half < size:
        pairs = y.reshape(*y.shape[:-1], -1, 2, half)
        first, second = pairs.unbind(-2)
        y = torch.stack([first + second, first - second], -2).flatten(-3)
        half *= 2
    rotated: Tensor = y / size**0.5
    return rotated


def attend(
    q: Tensor,
    low_keys: Tensor,
    errors: Tensor,
    low_values: Tensor,
    full_keys: Tensor,
    full_values: Tensor,
    *,
    mean: Tensor | None,
    rotated: bool,
    seen: Tensor,
    sinks: Tensor | None,
    scaling: float,
    softcap: float,
    scores_threshold: float,
    values_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with low-bit copies.

    Parameters
    ----------
    q : Tensor
        float32 (batch, heads, queries, size).
    low_keys, low_values : Tensor
        The numbers that the copies stand for, float32 (batch, key heads, keys, size): keys less the mean, and rotated.
    errors : Tensor
        2-norms of the low-bit keys' residuals, (batch, key heads, keys); NaN: never to be trusted.
    full_keys, full_values : Tensor
        The full copies, float32.
    mean : Tensor, optional
        (batch, key heads, size), subtracted from the low-bit keys.
    rotated : bool
        Whether the low-bit keys are rotated.
    seen : Tensor
        bool (batch, queries, keys).
    sinks : Tensor, optional
        (heads,) logits that enter the normaliser alone.
    scaling, softcap : float
        Of the scores; softcap 0 is none.
    scores_threshold, values_threshold : float
        Of 2 z (1 - z) s r and of z; below 0 everything is read in full, at infinity nothing.

    Returns
    -------
    tuple
        float32 (batch, queries, heads, value size); recomputed scores (batch, heads, queries); values read in full,
        each once for the heads of its group (batch, key heads, queries).
    """
    batch, heads, queries, _ = q.shape
    group = heads // low_keys.shape[1]

    def by_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1)

    low, r = _low_scores(
        q, by_head(low_keys), by_head(errors), None if mean is None else by_head(mean), rotated, scaling
    )
    full = q @ by_head(full_keys).mT * scaling
    low = torch.where(low.isfinite(), low, full)
    slope = torch.ones_like(low)
    if softcap > 0:
        t = torch.tanh(low / softcap)
        low, full, slope = t * softcap, torch.tanh(full / softcap) * softcap, 1 - t * t
    # All of these: [batch, heads, queries, keys], or 1 for the keys.
    sink = None if sinks is None else sinks.view(1, -1, 1, 1).expand(batch, -1, queries, 1)
    rows = _Rows(seen[:, None].expand_as(low), sink)
    again = _recomputed(rows, low, r, slope, scores_threshold)
    better = torch.where(again, full, low)
    # Values are chosen with the normaliser of the low-bit scores, the one that there is by then.
    known = torch.exp(rows.logits(better, sink=False) - rows.logits(low).logsumexp(-1, keepdim=True))
    z = torch.where(seen.any(-1)[:, None, :, None], rows.probabilities(better), 0)
    large = (~(known <= values_threshold) & ~(z <= 0)).view(batch, -1, group, queries, z.shape[-1])
    large = large.any(2)
    chosen = by_head(large)
    # Values that aren't finite are always chosen; their low-bit copies, NaN, get the weight 0.
    tiny = known <= SKIP / rows.visible.sum(-1, keepdim=True)
    low_part = torch.where(chosen | tiny, 0, z) @ by_head(low_values.nan_to_num(0.0))
    output = torch.where(chosen, z, 0) @ by_head(full_values) + low_part
    misled = _misled(rows, low, better)
    again = torch.where(misled, rows.visible, again)
    output = torch.where(misled, rows.probabilities(full) @ by_head(full_values), output)
    if sinks is None:  # a query that sees nothing gets the mean of all values
        blind = by_head(full_values).mean(-2, keepdim=True).expand_as(output)
        output = torch.where(seen.any(-1)[:, None, :, None], output, blind)
    return output.transpose(1, 2).contiguous(), again.sum(-1), large.sum(-1)


@dataclass(frozen=True)
class _Rows:
    """Rows of scores under softmax, over the keys that their queries see and their heads' sinks."""

    #: bool (batch, heads, queries, keys).
    visible: Tensor
    #: float32 (batch, heads, queries, 1).
    sink: Tensor | None

    def logits(self, y: Tensor, sink: bool = True) -> Tensor:
        """The scores, -inf where a key isn't seen, and behind them the sink, where there is one."""
        seen = y.masked_fill(~self.visible, -torch.inf)
        return seen if self.sink is None or not sink else torch.cat([seen, self.sink], -1)

    def probabilities(self, y: Tensor) -> Tensor:
        """Of the keys alone; with a sink they don't add up to 1."""
        return self.logits(y).softmax(-1)[..., : y.shape[-1]]


def _low_scores(
    q: Tensor, low_keys: Tensor, errors: Tensor, mean: Tensor | None, rotated: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Scores of low-bit keys and of queries in 16-bit integers, and their root mean square errors, per query head."""
    size = q.shape[-1]
    moved = hadamard(q) if rotated else q
    codes, scales = quantise_vector(moved.reshape(-1, size))
    integers = codes.view(*scales.shape, -1).float() * scales[..., None]
    short = integers.flatten(1)[:, :size].view(q.shape)
    low = short @ low_keys.mT * scaling
    if mean is not None:
        low = low + (q @ mean[..., None]) * scaling
    return low, abs(scaling) * moved.norm(dim=-1, keepdim=True) * errors[:, :, None] / size**0.5


def _recomputed(rows: _Rows, low: Tensor, r: Tensor, slope: Tensor, threshold: float) -> Tensor:
    """Where the weight of a low-bit score exceeds the threshold."""
    if threshold == torch.inf:
        return torch.zeros_like(rows.visible)
    weight = softmax_gain(rows.probabilities(low), r, slope) * r
    # Written so that a NaN is recomputed.
    return ~(weight <= threshold) & rows.visible


def _misled(rows: _Rows, low: Tensor, better: Tensor) -> Tensor:
    """Rows (batch, heads, queries, 1) whose low-bit scores chose badly, so that they are computed in full."""
    top = rows.logits(low).amax(-1, keepdim=True)
    before, after = (torch.exp(rows.logits(y) - top).sum(-1, keepdim=True) for y in (low, better))
    risen = (rows.logits(better, sink=False) - top > SURPRISE).any(-1, keepdim=True)
    return risen | (after < VANISHED * before)
