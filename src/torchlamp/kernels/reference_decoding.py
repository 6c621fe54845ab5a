"""The readable reference of the decoding kernel: attention of new queries over low-bit copies with look-ahead.

`scores.hpp`, `values.hpp` and `attend.hpp` in `native/lowbit` are the kernel.
"""

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
        What the low-bit copies stand for, float32 (batch, key heads, keys, size): keys less the mean, and rotated.
    errors : Tensor
        2-norms of the low-bit keys' residuals, (batch, key heads, keys); NaN: never to be trusted.
    full_keys, full_values : Tensor
        The full copies, float32.
    mean : Tensor, optional
        (batch, key heads, size), what was taken from the keys.
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
    batch, heads, queries, size = q.shape
    group = heads // low_keys.shape[1]

    def by_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1)

    moved = hadamard(q) if rotated else q
    codes, scales = quantise_vector(moved.reshape(-1, size))
    integers = codes.view(*scales.shape, -1).float() * scales[..., None]
    short = integers.flatten(1)[:, :size].view(q.shape)
    low = short @ by_head(low_keys).mT * scaling
    if mean is not None:
        low = low + (q @ by_head(mean)[..., None]) * scaling
    full = q @ by_head(full_keys).mT * scaling
    visible = seen[:, None].expand_as(low)
    low = torch.where(low.isfinite(), low, full)
    slope = torch.ones_like(low)
    if softcap > 0:
        t = torch.tanh(low / softcap)
        low, full, slope = t * softcap, torch.tanh(full / softcap) * softcap, 1 - t * t
    sink = None if sinks is None else sinks.view(1, -1, 1, 1).expand(batch, -1, queries, 1)

    def probabilities(y: Tensor) -> Tensor:
        y = y.masked_fill(~visible, -torch.inf)
        if sink is not None:
            return torch.cat([y, sink], -1).softmax(-1)[..., :-1]
        return y.softmax(-1)

    z = probabilities(low)
    r = abs(scaling) * moved.norm(dim=-1, keepdim=True) * by_head(errors)[:, :, None] / size**0.5
    weight = softmax_gain(z, r, slope) * r
    # Written so that a NaN is recomputed.
    again = ~(weight <= scores_threshold) & visible
    if scores_threshold == torch.inf:
        again = torch.zeros_like(again)
    better = torch.where(again, full, low).masked_fill(~visible, -torch.inf)
    # Values are chosen with the normaliser of the low-bit scores, the one that there is by then.
    parts = [low.masked_fill(~visible, -torch.inf), *([] if sink is None else [sink])]
    known = torch.exp(better - torch.cat(parts, -1).logsumexp(-1, keepdim=True))
    z = torch.where(seen.any(-1)[:, None, :, None], probabilities(better), 0)
    large = (~(known <= values_threshold) & ~(z <= 0)).view(batch, -1, group, queries, z.shape[-1])
    large = large.any(2)
    chosen = by_head(large)
    # Values that aren't finite are always chosen; their low-bit copies, NaN, get the weight 0.
    tiny = known <= SKIP / visible.sum(-1, keepdim=True)
    low_part = torch.where(chosen | tiny, 0, z) @ by_head(low_values.nan_to_num(0.0))
    output = torch.where(chosen, z, 0) @ by_head(full_values) + low_part
    # Probabilities that low-bit scores misled by more than this decided nothing well: such rows are done in full.
    ends = [low.masked_fill(~visible, -torch.inf), *([] if sink is None else [sink])]
    top = torch.cat(ends, -1).amax(-1, keepdim=True)
    before, after = (
        torch.exp(torch.cat([y, *ends[1:]], -1) - top).sum(-1, keepdim=True) for y in (ends[0], better)
    )
    misled = ((better - top) > SURPRISE).any(-1, keepdim=True) | (after < VANISHED * before)
    again = torch.where(misled, visible, again)
    in_full = probabilities(full) @ by_head(full_values)
    output = torch.where(misled, in_full, output)
    if sinks is None:  # a query that sees nothing gets the mean of all values
        blind = by_head(full_values).mean(-2, keepdim=True).expand_as(output)
        output = torch.where(seen.any(-1)[:, None, :, None], output, blind)
    return output.transpose(1, 2).contiguous(), again.sum(-1), large.sum(-1)
