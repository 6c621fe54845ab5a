"""The strict rule of LAMP: a threshold on the l1 error that one relative rounding error causes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.rule import NumberRule
from torchlamp.rules.threshold import ThresholdForm, exceeds
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class Strict(NumberRule):
    """`strict:T`: recompute j iff 2 z_j (1 - z_j) |y_j| s_j > T.

    The left side is the l1 norm of column j of the softmax's Jacobian times y_j: the l1 change of the
    probabilities per unit of relative error in y_j. Columns decouple, so this is the exact optimum of "leave
    as many entries low as possible while the 1->1 norm of J diag(y) diag(g) stays <= T". s_j is the slope of
    a softcap (1 without one). With an attention sink z includes it in the normaliser and the formula stays.

    T >= 0 is that norm; the published grid runs from 1e-3 to 50. Flat and saturated rows may get nothing.
    NaN and infinite scores are selected.

    Source: arXiv 2601.21623 v2 (the rule as published); optimality, slope and sink derived, docs/method.md.
    """

    threshold: float
    name = "strict"
    examples = ("strict:0.1", "strict:0.005", "strict:50")

    def select(self, tile: Tile) -> Tensor:
        """Entries whose weighted column norm exceeds T."""
        z = tile.probabilities
        half_weight = (1 - z).mul_(z).mul_(tile.scores.abs())
        if tile.slope is not None:
            half_weight.mul_(tile.slope)
        return exceeds(tile, half_weight, self.threshold / 2)

    def threshold_form(self) -> ThresholdForm:
        """Weight "strict"."""
        return ThresholdForm("strict", self.threshold)
