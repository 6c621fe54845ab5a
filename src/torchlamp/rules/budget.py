"""Rules in the sum form: leave the cheapest entries of a row low while the sum of their weights stays in a budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.products import WITHOUT_FLOAT64
from torchlamp.rules.rule import NumberRule
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class Budget(NumberRule):
    """`budget:T`: leave low the smallest z_j (1 - z_j) s_j of each row while their sum is at most T.

    The sum over the entries left low bounds half the l1 error of the row per unit of error in its scores. Every
    entry counts alike in what is maximised, so the greedy choice is the exact optimum (docs/method.md 2, form B).

    T in [0, 1]. 1 recomputes nothing: sum z (1 - z) < 1. Equal weights are left low in the order of their keys.
    NaN and infinite scores are selected. Sums are formed in float64.

    Source: arXiv 2609.39361, second stage; the optimality derived, docs/method.md 4.7.
    """

    budget: float
    name = "budget"
    role = "published"
    examples = ("budget:0.02", "budget:0.001")
    allowed = (0.0, 1.0)
    operations = 4.0

    def select(self, tile: Tile) -> Tensor:
        """Entries beyond the budget of their row."""
        return beyond(tile, tile.gain * 0.5, self.budget)


@dataclass(frozen=True)
class RunningBudget(NumberRule):
    """`running-budget:T`: leave low the smallest 2 z_j (1 - z_j) s_j r_j of each row while their sum is at most T.

    `budget` with the running error of each score, so that T >= 0 is an expected bound of the l1 error of the row,
    absolute as for `running`. At other sites the tile's own gain stands in the place of 2 z (1 - z) s.

    Source: derived, docs/method.md 4.7.
    """

    budget: float
    name = "running-budget"
    examples = ("running-budget:0.1", "running-budget:0.001")
    looks_through = "any"
    operations = 7.0
    byproducts = frozenset({"squares"})

    def select(self, tile: Tile) -> Tensor:
        """Entries beyond the budget of their row."""
        return beyond(tile, tile.gain * tile.error, self.budget)


def beyond(tile: Tile, weight: Tensor, budget: float) -> Tensor:
    """Visible entries that don't fit the budget when each row takes its weights in ascending order.

    Parameters
    ----------
    tile
        For `visible` and `scores`.
    weight
        (..., rows, keys), at least 0; NaN counts as infinite.
    budget
        At least 0.

    Returns
    -------
    bool, the shape of `weight`.
    """
    home = weight.device
    if home.type in WITHOUT_FLOAT64:
        tile, weight = tile.to("cpu"), weight.cpu()
    known = tile.visible & (tile.scores.abs() < torch.inf)
    cost = weight.masked_fill(~known, torch.inf).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    ascending, order = cost.sort(dim=-1, stable=True)
    fits = ascending.to(torch.float64).cumsum(dim=-1) <= budget
    stays = torch.zeros_like(fits).scatter_(-1, order, fits)
    return stays.logical_not_().logical_and_(tile.visible).to(home)
