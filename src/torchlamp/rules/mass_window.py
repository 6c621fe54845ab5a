"""The exact optimum of the problem that LAMP's first version states for softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.products import WITHOUT_FLOAT64
from torchlamp.rules.rule import NumberRule
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class MassWindow(NumberRule):
    """`mass-window:P`: leave low the largest set S with ||diag(z)^-1 J diag(g)||_inf <= 2 - P.

    The same norm as `mass`, sum_S z + 1 - 2 min_S z, but over all sets instead of those that a prefix of the
    descending order leaves. If z_m is the smallest entry left low, the largest feasible S takes the entries after
    it in ascending order while their sum is at most 1 - P + 2 z_m; so an optimum is always a contiguous window of
    the ascending order, and the longest over all m is found by a search in prefix sums. Of windows equally long,
    the one with the smallest entries is left low. Sums are formed in float64.

    P in [0, 1] is 2 - tau of the paper. A row with one visible key recomputes nothing. Rows with a NaN or infinite
    score are recomputed as a whole.

    Source: the problem of arXiv 2601.21623 v1; the optimum derived, docs/method.md 4.4.
    """

    mass: float
    name = "mass-window"
    examples = ("mass-window:0.9", "mass-window:0.5", "mass-window:1")
    allowed = (0.0, 1.0)
    operations = 12.0

    def select(self, tile: Tile) -> Tensor:
        """Entries outside the longest feasible window."""
        if tile.scores.shape[-1] == 0:
            return torch.zeros_like(tile.visible)
        home = tile.scores.device
        if home.type in WITHOUT_FLOAT64:
            tile = tile.to("cpu")
        # Invisible keys come last in the ascending order, so that no feasible window reaches them.
        z, order = tile.probabilities.masked_fill(~tile.visible, 4.0).sort(dim=-1, stable=True)
        sums = torch.nn.functional.pad(z.to(torch.float64).cumsum(dim=-1), (1, 0))
        limit = sums[..., :-1] + (1 - self.mass) + 2 * z.to(torch.float64)
        count = tile.visible.sum(dim=-1, keepdim=True)
        # Without the slack a window whose sum equals its limit could be lost to rounding: that of the sums here, and
        # that of the softmax, whose probabilities may add up to more than 1.
        slack = (sums.gather(-1, count) - 1).clamp_(min=0.0) + 1e-12
        ends = torch.searchsorted(sums, limit + slack, right=True) - 1
        place = torch.arange(z.shape[-1], device=z.device)
        lengths = ends.clamp_max(count) - place
        length, start = lengths.max(dim=-1, keepdim=True)
        inside = (place >= start) & (place < start + length)
        stays = torch.zeros_like(inside).scatter_(-1, order, inside)
        spoilt = (~(tile.scores.abs() < torch.inf) & tile.visible).any(dim=-1, keepdim=True)
        return (stays.logical_not_() | spoilt).logical_and_(tile.visible).to(home)
