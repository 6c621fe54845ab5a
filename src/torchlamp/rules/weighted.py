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
            If the tile lacks what the weight is made of.
        """
        return exceeds(tile, self.weight(tile), self.value)

    def _error(self, tile: Tile) -> Tensor:
        what = "the error estimate made of norms" if self.needs_bridge else "the running error"
        return self._need(tile.error, f"{what}: give the tile `error`")

    def _exact(self, tile: Tile) -> Tensor:
        return self._need(tile.exact, "the exact scores: give the tile `exact`")

    def _distance(self, tile: Tile) -> Tensor:
        return self._need(tile.distance, "how far the values are from the output: give the tile `distance`")

    def _need(self, tensor: Tensor | None, what: str) -> Tensor:
        if tensor is None:
            raise ValueError(f"rule '{self}' needs {what}")
        return tensor
