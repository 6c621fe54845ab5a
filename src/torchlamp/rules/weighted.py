"""Rules that weigh each entry by itself and compare the weight with one number."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from torchlamp.rules.rule import NumberRule
from torchlamp.rules.threshold import exceeds
from torchlamp.rules.tile import Tile


class WeightRule(NumberRule):
    """`name:T`: recompute j iff its weight exceeds T; NaN and infinite scores are selected.

    A subclass says what the weight is: an amplification by what follows, times an estimate of the error.
    """

    @abstractmethod
    def weight(self, tile: Tile) -> Tensor:
        """The weight of every entry, a new tensor (..., rows, keys); meaningless where not visible."""

    def select(self, tile: Tile) -> Tensor:
        """Visible entries whose weight exceeds T, is NaN, or belongs to a score that is not finite.

        Raises
        ------
        ValueError
            If the tile has no answer to what the weight asks for.
        """
        return exceeds(tile, self.weight(tile), self.value)
