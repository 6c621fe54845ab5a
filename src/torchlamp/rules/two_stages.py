"""The two stages of LampAttention over all heads and warps at once; `LampAttention` defines them.

Shapes: [G, W, R, T, S, B] are groups (leading dimensions of a tile, such as heads), warps, the 16 rows of a warp, tiles
of keys, their 4 sub-blocks, and 16 keys. `tests/lamp_attention_reference.py` is the same for one warp, in loops.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from torchlamp.kernels.online import (
    SUB_BLOCK,
    TILE_KEYS,
    OnlineFormats,
    advance,
    exponentials,
    in_blocks,
    new_maximum,
    out_of_blocks,
    start,
)
from torchlamp.rules.online_tile import OnlineTile

_SUB_BLOCKS = TILE_KEYS // SUB_BLOCK
#: Subsets of sub-blocks that stay low: the largest first, those of one size in lexicographic order.
_SUBSETS = [
    subset for size in range(_SUB_BLOCKS, -1, -1) for subset in combinations(range(_SUB_BLOCKS), size)
]


class Setting(NamedTuple):
    """The parameter of `lamp-attention`: margin and budget, and the options."""

    #: Margin of the first stage; None: there is no first stage.
    delta: float | None
    #: Budget of the second stage, in [0, 1].
    tau: float
    #: Whether the margin is `delta` times a bound made of norms, in place of `delta` times the running maximum.
    norms: bool = False
    #: Whether the second stage goes by size, in place of enumerating subsets.
    greedy: bool = False
    #: Whether a tile with two or more chosen sub-blocks is recomputed whole.
    compact: bool = False


class _Keys(NamedTuple):
    """A tile of keys: [G, W, R, S, B] each; `margin` is None where nobody reads it."""

    low: Tensor
    high: Tensor
    visible: Tensor
    margin: Tensor | None

    def top(self, logits: Tensor) -> Tensor:
        """The largest visible logit of each row and sub-block, [G, W, R, S]; -inf where none is visible."""
        return logits.masked_fill(~self.visible, -torch.inf).amax(-1)

    def flat(self, *masks: Tensor) -> list[Tensor]:
        """Logits, visibility and masks [G, W, R, S, B] as [G, W, R, keys]."""
        return [x.flatten(-2) for x in (self.low, self.high, self.visible, *masks)]


def two_stages(tile: OnlineTile, setting: Setting) -> tuple[Tensor, Tensor]:
    """Entries that both stages recompute, and those of the second stage alone: bool, the shape of the scores."""
    shape, offset, formats = tile.scores.shape, tile.offset, tile.formats
    chosen, late = (torch.zeros(shape, dtype=torch.bool, device=tile.scores.device) for _ in range(2))
    if tile.scores.numel() == 0:
        return chosen, late
    visible = in_blocks(tile.visible, offset, False)
    low, high = (in_blocks(x, offset, 0.0) for x in (tile.logits, tile.recomputed))
    margin = in_blocks(tile.margin, offset, 0.0) if setting.norms and setting.delta else None
    sink = None
    if tile.sink is not None:
        sink = in_blocks(tile.sink.expand(shape), offset, 0.0)[:, :, :, 0, -1, -1:]
    maximum, total = start(low.flatten(3), sink, formats)
    found: list[tuple[Tensor, Tensor]] = []
    for t in range(low.shape[3]):
        keys = _Keys(low[..., t, :, :], high[..., t, :, :], visible[..., t, :, :], None)
        if margin is not None:
            keys = keys._replace(margin=margin[..., t, :, :])
        masks = _one_tile(maximum, total, keys, setting, formats)
        flat = keys.flat(*masks)
        raised = new_maximum(maximum, *flat)
        _, total = advance(maximum, total, raised, exponentials(formats, raised, *flat[:4]))
        maximum = raised
        found.append(masks)
    chosen, late = (torch.stack(masks, dim=3) for masks in zip(*found, strict=True))
    return out_of_blocks(chosen, offset, shape), out_of_blocks(late, offset, shape)


def _one_tile(
    maximum: Tensor, total: Tensor, keys: _Keys, setting: Setting, formats: OnlineFormats
) -> tuple[Tensor, Tensor]:
    """Chosen and late entries of a tile, [G, W, R, S, B]; `maximum` and `total` [G, W, R, 1] are those before it."""
    seen = keys.visible.any(-1).any(2)
    first = torch.zeros_like(seen)
    if setting.delta is not None:
        first = _first_stage(maximum[..., 0], keys, setting)
    early = first[:, :, None, :, None] & keys.visible
    flat = keys.flat(early, torch.zeros_like(early))
    raised = new_maximum(maximum, *flat)
    weights = exponentials(formats, raised, *flat[:4])
    _, summed = advance(maximum, total, raised, weights)
    # [G, W, R, S]: what each sub-block adds to the sum of the second stage.
    weights, omega = weights.view(keys.low.shape).double(), summed.double()
    cost = ((omega[..., None] - weights) * weights).sum(-1)
    budget = setting.tau * omega.square()
    second = (_greedy if setting.greedy else _largest)(cost, budget, first) & ~first & seen
    if setting.compact:
        disruptive = ((first | second).sum(-1, keepdim=True) >= 2) & seen
        first, second = first | disruptive, second & ~disruptive
    chosen, late = ((mask & seen)[:, :, None, :, None] & keys.visible for mask in (first | second, second))
    return chosen, late


def _first_stage(maximum: Tensor, keys: _Keys, setting: Setting) -> Tensor:
    """Sub-blocks that the first stage recomputes, bool [G, W, S]; `maximum` [G, W, R] is that before the tile."""
    assert setting.delta is not None
    top, again, sees = keys.top(keys.low), keys.top(keys.high), keys.visible.any(-1)
    reach = None
    if setting.norms:
        reach = torch.zeros_like(top) if keys.margin is None else keys.top(keys.margin)
    threat = torch.where(sees, top - maximum[..., None], -torch.inf)
    # A threat that can't be told, of infinities or NaN, comes first.
    threat = threat.masked_fill(threat.isnan(), torch.inf).amax(2)
    order = threat.argsort(dim=-1, descending=True, stable=True)
    fired = torch.zeros_like(threat, dtype=torch.bool)
    for place in range(order.shape[-1]):
        at = order[..., place : place + 1]
        index = at[:, :, None, :].expand(*maximum.shape, 1)
        mine, recomputed, sees_it = (x.gather(-1, index)[..., 0] for x in (top, again, sees))
        unit = maximum.abs() if reach is None else reach.gather(-1, index)[..., 0]
        # False with NaN: what can't be compared is recomputed.
        stays = maximum.double() > mine.double() + setting.delta * unit.double()
        fires = ~(stays | ~sees_it).all(-1, keepdim=True)
        fired.scatter_(-1, at, fires)
        maximum = torch.where(fires & sees_it, torch.maximum(maximum, recomputed), maximum)
    return fired


def _largest(cost: Tensor, budget: Tensor, first: Tensor) -> Tensor:
    """What isn't in the largest subset of sub-blocks, none of them in `first`, that fits every row: bool [G, W, S].

    Parameters
    ----------
    cost, budget : Tensor
        float64 [G, W, R, S] and [G, W, R, 1].
    first : Tensor
        bool [G, W, S].
    """
    found = torch.zeros_like(first[..., :1])
    low = torch.zeros_like(first)
    for subset in _SUBSETS:
        members = list(subset)
        fits = (cost[..., members].sum(-1) <= budget[..., 0]).all(-1) & ~first[..., members].any(-1)
        takes = fits[..., None] & ~found
        found |= takes
        low[..., members] |= takes
    return ~low


def _greedy(cost: Tensor, budget: Tensor, first: Tensor) -> Tensor:
    """The same for a subset that grows by ascending largest share of a row's budget, as long as every row is kept."""
    # A row whose running sum is 0 sees nothing here and spends nothing.
    share = torch.where(budget > 0, cost / budget, torch.where(cost == 0, 0.0, torch.inf))
    worst = share.masked_fill(share.isnan(), torch.inf).amax(2).masked_fill(first, torch.inf)
    order = worst.argsort(dim=-1, stable=True)
    spent = torch.zeros_like(budget[..., 0])
    low = torch.zeros_like(first)
    for place in range(order.shape[-1]):
        at = order[..., place : place + 1]
        index = at[:, :, None, :].expand(*spent.shape, 1)
        after = spent + cost.gather(-1, index)[..., 0]
        fits = (after <= budget[..., 0]).all(-1, keepdim=True) & ~first.gather(-1, at)
        low.scatter_(-1, at, fits)
        spent = torch.where(fits, after, spent)
    return ~low
