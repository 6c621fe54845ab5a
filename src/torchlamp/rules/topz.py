"""A baseline without any analysis: recompute the large probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.rule import NumberRule
from torchlamp.rules.threshold import ThresholdForm, exceeds
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class TopZ(NumberRule):
    """`topz:T`: recompute j iff z_j > T. The baseline that a look-ahead rule has to beat.

    T in [0, 1] is a probability: 0 recomputes every entry whose probability has not underflowed, 1 nothing.
    NaN and infinite scores are selected.

    Source: derived (a plain threshold on the attention probability).
    """

    threshold: float
    name = "topz"
    examples = ("topz:0.05", "topz:0.5")
    allowed = (0.0, 1.0)
    operations = 1.0

    def select(self, tile: Tile) -> Tensor:
        """Entries whose probability exceeds T."""
        return exceeds(tile, tile.probabilities, self.threshold)

    def threshold_form(self) -> ThresholdForm:
        """Weight "topz"."""
        return ThresholdForm("topz", self.threshold)
