"""Look-ahead at block level: blocks of scores whose errors matter together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.rules.rule import NumberRule
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class BlockRunning(NumberRule):
    """`block-running:T`: recompute a 64 x 64 block of a head iff (sum_ij (2 z_ij (1 - z_ij) s_ij r_ij)^2)^(1/2) > T.

    r is the expected error of a score, as `running` has it: the block's expected share of the l1 errors of its rows,
    root of the sum of squares over the rows and keys of the block. KL is quadratic in these errors, so at a given
    number of blocks the largest sums are worth most. T >= 0. A block with a score that isn't finite is selected.

    Source: derived, docs/competitors.md.
    """

    threshold: float
    name = "block-running"
    examples = ("block-running:0.3", "block-running:0.05")
    looks_through = "blocks"
    operations = 8.0
    byproducts = frozenset({"squares"})

    def select(self, tile: Tile) -> Tensor:
        """All visible entries of the blocks beyond the threshold."""
        view = tile.blocks
        groups = view.key_blocks()
        weights = (tile.gain * tile.error).square()
        weights = weights.nan_to_num(nan=torch.inf).masked_fill(~tile.scores.isfinite(), torch.inf)
        weights = weights.masked_fill(~tile.visible, 0.0)
        chosen = torch.zeros_like(tile.visible.expand(tile.scores.shape))
        for _, rows in view.row_blocks():
            by_key = weights[..., rows, :].sum(-2)
            sums = by_key.new_zeros(*by_key.shape[:-1], int(groups[-1]) + 1)
            sums.index_add_(-1, groups, by_key)
            chosen[..., rows, :] = (sums.sqrt() > self.threshold)[..., None, groups]
        return chosen & tile.visible
