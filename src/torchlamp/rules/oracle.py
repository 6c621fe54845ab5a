"""Rules that know the true error: no hardware could, and they show how much is left to win."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.tile import Tile
from torchlamp.rules.value_aware import move
from torchlamp.rules.weighted import WeightRule


@dataclass(frozen=True)
class Oracle(WeightRule):
    """`oracle:T`: recompute j iff 2 z_j (1 - z_j) s_j |y_j - exact y_j| > T. Not realisable.

    The running-error rule with the true rounding error in the place of its estimate. At other sites the tile's
    own gain stands in the place of 2 z (1 - z) s. T >= 0 is an l1 error of a row of probabilities.

    Source: derived, docs/method.md 4.11.
    """

    threshold: float
    name = "oracle"
    examples = ("oracle:0.01", "oracle:0.0001")
    looks_through = "any"
    operations = 6.0
    role = "oracle"

    def weight(self, tile: Tile) -> Tensor:
        """Gain times the true error."""
        return tile.gain * (tile.scores - tile.exact).abs()


@dataclass(frozen=True)
class OracleResidual(WeightRule):
    """`oracle-residual:T`: `running-residual` with the true rounding error. Not realisable.

    T >= 0 is a change of the residual stream relative to it.

    Source: derived, docs/method.md 4.11.
    """

    threshold: float
    name = "oracle-residual"
    examples = ("oracle-residual:0.001",)
    looks_through = "attention"
    operations = 12.0
    role = "oracle"
    reads_residual_stream = True
    further_work = frozenset({"distances"})

    def weight(self, tile: Tile) -> Tensor:
        """Change of the residual stream if y_j alone became exact."""
        return move(tile, tile.exact - tile.scores) * tile.distance
