"""An online softmax over tiles of keys, whose exponentials are narrow: the arithmetic of LampAttention.

A row's keys come in tiles of 64. With mu the running maximum and omega the running sum of exponentials before a tile,

    mu' = max(mu, the tile's logits),   e_j = exp(y_j - mu'),   omega' = exp(mu - mu') omega + sum e_j.

Logits that are recomputed are kept in a wider format, and so are their exponentials. Running maxima have the wide
format; narrow logits are shifted by mu' rounded to theirs. Shifts and exponentials are rounded to unsigned formats,
sums and rescaling are float32.

References
----------
LampAttention, arXiv 2609.39361; docs/lamp-attention.md says what was read in it and what is our reading.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchlamp.kernels.rounding import round_float64, round_to_grid
from torchlamp.kernels.specification import Grid

#: Keys of a tile, keys of a sub-block, which is recomputed as a whole, and query rows of a warp, which decide together.
TILE_KEYS, SUB_BLOCK, WARP_ROWS = 64, 16, 16
#: Exponents of unsigned formats with 5 bits of them: shifts as IEEE has it, exponentials end in the binade of 1.
_SHIFT_EXPONENTS, _EXPONENTIAL_EXPONENTS = (-14, 15), (-30, 0)


@dataclass(frozen=True)
class OnlineFormats:
    """The formats of scores, narrow and recomputed; those of shifts and exponentials follow from them.

    Scores with float32's exponent range (PS) have shifts and exponentials of that range, too. Others have unsigned ones
    with 5 bits of exponent: the largest exponential is in the binade of 1, the smallest normal one is 2^-30.
    """

    low: Grid
    high: Grid

    @classmethod
    def of(cls, low: Grid, mantissa_bits: int) -> "OnlineFormats":
        """Scores that are recomputed with so many mantissa bits and the narrow format's exponents."""
        return cls(low, replace(low, mantissa_bits=mantissa_bits))

    def shift(self, scores: Grid) -> Grid:
        """The format of mu' - y for scores of a format."""
        return _unsigned(scores, *_SHIFT_EXPONENTS)

    def exponential(self, scores: Grid) -> Grid:
        """The format of exp(y - mu') for scores of a format."""
        return _unsigned(scores, *_EXPONENTIAL_EXPONENTS)


def _unsigned(scores: Grid, smallest: int, largest: int) -> Grid:
    bits = scores.mantissa_bits
    if scores.has_float32_range:
        return Grid(bits, signed=False, negative_zero=False)
    return Grid(bits, smallest, largest, overflow="saturate", signed=False, negative_zero=False)


def start(low: Tensor, sink: Tensor | None, formats: OnlineFormats) -> tuple[Tensor, Tensor]:
    """Running maximum and running sum before the first tile, float32 (..., rows, 1).

    Parameters
    ----------
    low : Tensor
        float32 (..., rows, keys), for the shape.
    sink : Tensor or None
        float32, broadcastable to (..., rows, 1): a logit that enters the sum and has no value.
    formats : OnlineFormats
        Of scores.
    """
    shape = (*low.shape[:-1], 1)
    if sink is None:
        return low.new_full(shape, -torch.inf), low.new_zeros(shape)
    maximum = round_to_grid(sink.expand(shape).contiguous(), formats.high)
    return maximum, torch.exp(sink.double() - maximum.double()).float()


def new_maximum(
    maximum: Tensor, low: Tensor, high: Tensor, visible: Tensor, chosen: Tensor, late: Tensor
) -> Tensor:
    """Mu' (..., rows, 1) of a tile (..., rows, n): chosen logits count as recomputed, but late ones as they were."""
    logits = torch.where(chosen & ~late, high, low).masked_fill(~visible, -torch.inf)
    return torch.maximum(maximum, logits.amax(-1, keepdim=True))


def exponentials(
    formats: OnlineFormats, maximum: Tensor, low: Tensor, high: Tensor, visible: Tensor, chosen: Tensor
) -> Tensor:
    """e_j of a tile, float32 (..., rows, n); 0 where hidden, and in rows whose logits are all -infinity.

    A recomputed logit above the maximum has the exponential 1: shifts have no sign.
    """
    found = _exponential(round_to_grid(maximum, formats.low), low, formats, formats.low)
    if bool(chosen.any()):
        found = torch.where(chosen, _exponential(maximum, high, formats, formats.high), found)
    return found.masked_fill(~visible | (maximum == -torch.inf), 0.0)


def _exponential(maximum: Tensor, logits: Tensor, formats: OnlineFormats, scores: Grid) -> Tensor:
    shift = round_float64(maximum.double() - logits.double(), formats.shift(scores))
    return round_float64(torch.exp(-shift.double()), formats.exponential(scores))


def advance(maximum: Tensor, total: Tensor, raised: Tensor, exponentials: Tensor) -> tuple[Tensor, Tensor]:
    """What earlier exponentials are multiplied by, exp(mu - mu'), and the new sum omega', float32 (..., rows, 1).

    The sum is formed in float64, where exponentials with 5 bits of exponent add without error, and rounded once.
    """
    factor = torch.exp(maximum.double() - raised.double()).float().masked_fill(maximum == -torch.inf, 0.0)
    new = exponentials.double().sum(-1, keepdim=True)
    return factor, (factor.double() * total.double() + new).float()


def online_weights(
    low: Tensor,
    high: Tensor,
    visible: Tensor,
    chosen: Tensor,
    late: Tensor,
    formats: OnlineFormats,
    *,
    offset: int = 0,
    sink: Tensor | None = None,
) -> Tensor:
    """What values are weighted by: exponentials, rescaled tile by tile, over the last running sum.

    Parameters
    ----------
    low, high : Tensor
        float32 (..., rows, keys): logits in the narrow format, and in the wide one.
    visible, chosen, late : Tensor
        bool (..., rows, keys): keys that a row sees; those whose logits are recomputed; those of them that are
        recomputed after the tile's maximum is settled.
    formats : OnlineFormats
        Of scores, shifts and exponentials.
    offset : int
        Place of the first key in its tile, 0..63.
    sink : Tensor or None
        As for `start`.

    Returns
    -------
    float32 (..., rows, keys), 0 where hidden.
    """
    maximum, total = start(low, sink, formats)
    weights = torch.zeros_like(low)
    scales: list[tuple[slice, Tensor]] = []
    for first in range(-offset, low.shape[-1], TILE_KEYS):
        at = slice(max(first, 0), first + TILE_KEYS)
        parts = [x[..., at] for x in (low, high, visible, chosen, late)]
        raised = new_maximum(maximum, *parts)
        weights[..., at] = exponentials(formats, raised, *parts[:4])
        factor, total = advance(maximum, total, raised, weights[..., at])
        scales = [(tile, scale * factor) for tile, scale in scales]
        scales.append((at, torch.ones_like(factor)))
        maximum = raised
    for at, scale in scales:
        weights[..., at] *= scale
    return (weights / total).masked_fill(~visible, 0.0)


def in_blocks(x: Tensor, offset: int, fill: float | bool) -> Tensor:
    """(..., rows, keys) in warps, tiles and sub-blocks: (groups, warps, 16 rows, tiles, 4 sub-blocks, 16 keys).

    The leading dimensions become one. `offset` keys before the first, rows and keys after the last are `fill`.
    """
    rows, keys = x.shape[-2:]
    flat = x.reshape(-1, rows, keys)
    filled = pad(flat, (offset, -(offset + keys) % TILE_KEYS, 0, -rows % WARP_ROWS), value=fill)
    return filled.view(
        len(flat), -1, WARP_ROWS, filled.shape[-1] // TILE_KEYS, TILE_KEYS // SUB_BLOCK, SUB_BLOCK
    )


def out_of_blocks(blocks: Tensor, offset: int, shape: torch.Size) -> Tensor:
    """The inverse of `in_blocks`, for a tensor of `shape`."""
    rows, keys = shape[-2:]
    groups, warps = blocks.shape[:2]
    whole = blocks.reshape(groups, warps * WARP_ROWS, -1)
    return whole[:, :rows, offset : offset + keys].reshape(shape)
