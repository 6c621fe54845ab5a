"""A static competitor: the first layers in float32, whatever the scores are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.rule import NumberRule
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class FirstLayers(NumberRule):
    """`first-layers:N`: recompute every visible entry of the layers 0 .. N - 1, and no other.

    Keeping the first layer's attention in full is a static choice that quantised caches are given. N >= 0.

    Source: the static baseline of quantised key-value caches, docs/competitors.md.
    """

    count: float
    name = "first-layers"
    role = "static"
    examples = ("first-layers:1", "first-layers:3")
    looks_through = "attention"

    def select(self, tile: Tile) -> Tensor:
        """Everything in the first layers."""
        return tile.visible & (tile.layer < self.count)
