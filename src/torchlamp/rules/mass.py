"""The rule of LAMP's first version: recompute the largest probabilities until they hold a given mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.products import WITHOUT_FLOAT64
from torchlamp.rules.rule import NumberRule
from torchlamp.rules.threshold import exceeds
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class Mass(NumberRule):
    """`mass:P`: in descending order, recompute the k-th largest iff (sum of the larger ones) + 2 z_min < P.

    z_min is the row's smallest visible probability. The recomputed entries are the smallest prefix H of the
    descending order with sum_H z + 2 z_min >= P, that is, the smallest for which the entries S left low
    satisfy ||diag(z)^-1 J diag(g)||_inf = sum_S z + 1 - 2 min_S z <= 2 - P: the worst componentwise
    relative error of the probabilities per unit of absolute error in the logits. It is the best prefix, not
    always the best set (docs/method.md has an example). Equal probabilities are taken in the order of their
    keys. Sums are formed in float64. The mass of an attention sink counts as already exact.

    P in [0, 1] is 2 - tau of the paper: 0 recomputes nothing; at 1 only entries with a combined mass of at
    most twice the smallest stay low. A row with one visible key recomputes nothing. The slope of a softcap
    has no part in it, the errors bounded are those of the logits. NaN and infinite scores are selected; if
    a row's sum is NaN, so is its whole row.

    Source: arXiv 2601.21623 v1; there z_min runs over masked keys too, here over the visible ones.
    """

    mass: float
    name = "mass"
    role = "published"
    examples = ("mass:0.9", "mass:0.5", "mass:1")
    allowed = (0.0, 1.0)
    operations = 10.0

    def select(self, tile: Tile) -> Tensor:
        """Entries of the smallest prefix that holds the mass."""
        if tile.scores.shape[-1] == 0:  # a minimum over nothing is an error in torch
            return torch.zeros_like(tile.visible)
        home = tile.scores.device
        if home.type in WITHOUT_FLOAT64:
            tile = tile.to("cpu")
        z = tile.probabilities
        smallest = z.masked_fill(~tile.visible, torch.inf).amin(dim=-1, keepdim=True).to(torch.float64)
        # Below every probability, so that keys out of sight come last and are in nobody's sum.
        descending, order = z.masked_fill(~tile.visible, -1.0).sort(dim=-1, descending=True, stable=True)
        sums = descending.to(torch.float64).clamp_(min=0.0).cumsum(dim=-1)
        # What a sink holds, or else the rounding residue of the softmax's sum.
        elsewhere = (1.0 - sums[..., -1:]).clamp_(min=0.0)
        larger = torch.cat([torch.zeros_like(elsewhere), sums[..., :-1]], dim=-1).add_(elsewhere)
        covered = torch.empty_like(larger).scatter_(-1, order, larger).add_(2 * smallest)
        return exceeds(tile, covered.neg_(), -self.mass).to(home)
