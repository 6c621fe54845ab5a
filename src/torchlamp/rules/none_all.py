"""The two ends: recompute nothing, recompute everything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.rules.rule import Rule
from torchlamp.rules.threshold import ThresholdForm
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class Nothing(Rule):
    """`none`: recompute nothing, whatever the values are; the plain low-precision baseline. No parameter."""

    name = "none"
    role = "control"
    examples = ("none",)
    looks_through = "any"

    def select(self, tile: Tile) -> Tensor:
        """Nothing."""
        return torch.zeros_like(tile.scores, dtype=torch.bool)

    def threshold_form(self) -> ThresholdForm:
        """No weight exceeds an infinite threshold."""
        return ThresholdForm("topz", math.inf)


@dataclass(frozen=True)
class Everything(Rule):
    """`all`: recompute every visible entry; float32 scores by the long way. No parameter."""

    name = "all"
    role = "control"
    examples = ("all",)
    looks_through = "any"

    def select(self, tile: Tile) -> Tensor:
        """Every visible entry."""
        return tile.visible.clone(memory_format=torch.contiguous_format)

    def threshold_form(self) -> ThresholdForm:
        """Every probability exceeds -1."""
        return ThresholdForm("topz", -1.0)
