"""The strict rule of LAMP: a threshold on the l1 error that one relative rounding error causes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.threshold import ThresholdForm
from torchlamp.rules.tile import Tile
from torchlamp.rules.weighted import WeightRule


@dataclass(frozen=True)
class Strict(WeightRule):
    """`strict:T`: recompute j iff 2 z_j (1 - z_j) s_j |y_j| > T.

    The left side is the l1 norm of column j of the softmax's Jacobian times y_j: the l1 change of the
    probabilities per unit of relative error in y_j. Columns decouple, so this is the exact optimum of "leave
    as many entries low as possible while the 1->1 norm of J diag(y) diag(g) stays <= T". s_j is the slope of
    a softcap (1 without one). With an attention sink z includes it in the normaliser and the formula stays.
    At other sites the tile's own gain stands in the place of 2 z (1 - z) s.

    T >= 0 is that norm; the published grid runs from 1e-3 to 50. Flat and saturated rows may get nothing.
    NaN and infinite scores are selected.

    Source: arXiv 2601.21623 v2 (the rule as published); optimality, slope and sink derived, docs/method.md 4.1.
    """

    threshold: float
    name = "strict"
    role = "published"
    examples = ("strict:0.1", "strict:0.005", "strict:50")
    looks_through = "any"
    operations = 5.0

    def weight(self, tile: Tile) -> Tensor:
        """Gain times |y|."""
        return tile.gain * tile.scores.abs()

    def threshold_form(self) -> ThresholdForm:
        """Weight "strict"."""
        return ThresholdForm("strict", self.threshold)
