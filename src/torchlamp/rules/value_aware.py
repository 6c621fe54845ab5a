"""Rules that look ahead through the softmax and the values: to the output of the head, or to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.tile import Tile
from torchlamp.rules.weighted import WeightRule

_DISTANCE = "how far the values are from the output: give the tile `distance`"


@dataclass(frozen=True)
class RunningOutput(WeightRule):
    """`running-output:T`: recompute j iff z_j s_j ||v_j - o|| / ||o|| r_j > T, o = sum_j z_j v_j.

    The change of a head's output by an error in y_j is do = z_j s_j (v_j - o) dy_j: a key whose value equals the
    output needs no accuracy, whatever its probability. r_j is the running error of `running`. T >= 0 is a relative
    error of one head's output.

    Source: derived, docs/method.md.
    """

    threshold: float
    name = "running-output"
    examples = ("running-output:0.01", "running-output:0.001")
    looks_through = "attention"
    operations = 8.0
    needs_error = True
    needs_distance = "output"

    def weight(self, tile: Tile) -> Tensor:
        """Change of the output per unit of error, times the expected rounding error."""
        error = self._need(tile.error, "the running error: give the tile `error`")
        return through_values(tile, self._need(tile.distance, _DISTANCE)).mul_(error)


@dataclass(frozen=True)
class RunningResidual(WeightRule):
    """`running-residual:T`: recompute j iff z_j s_j ||W_h (v_j - o)|| / ||x|| r_j > T.

    One step further than `running-output`: W_h is the block of the output projection that belongs to the head, x
    the residual stream that its result is added to. So heads and layers that change the stream little get little,
    and one T shares the budget between all of them. Where a norm stands between projection and stream (Gemma), its
    factor is part of the weight (docs/method.md). T >= 0 is a relative error of the residual stream.

    Source: derived, docs/method.md.
    """

    threshold: float
    name = "running-residual"
    examples = ("running-residual:0.001", "running-residual:0.0001")
    looks_through = "attention"
    operations = 8.0
    needs_error = True
    needs_distance = "residual"

    def weight(self, tile: Tile) -> Tensor:
        """Change of the residual stream per unit of error, times the expected rounding error."""
        error = self._need(tile.error, "the running error: give the tile `error`")
        return through_values(tile, self._need(tile.distance, _DISTANCE)).mul_(error)


@dataclass(frozen=True)
class BridgeResidual(WeightRule):
    """`bridge-residual:T`: `running-residual` with the error estimate of `bridge`.

    It needs no by-product of the accumulation. T >= 0 is a relative error of the residual stream.

    Source: derived, docs/method.md.
    """

    threshold: float
    name = "bridge-residual"
    examples = ("bridge-residual:0.001",)
    looks_through = "attention"
    operations = 11.0
    needs_bridge = True
    needs_distance = "residual"

    def weight(self, tile: Tile) -> Tensor:
        """Change of the residual stream per unit of error, times the estimate of the rounding error."""
        error = self._need(tile.error, "an error estimate: give the tile `error`")
        return through_values(tile, self._need(tile.distance, _DISTANCE)).mul_(error)


def through_values(tile: Tile, distance: Tensor) -> Tensor:
    """z_j s_j distance_j, a new tensor: what an absolute error in y_j does to what `distance` is measured in."""
    weight = tile.probabilities * distance
    return weight if tile.slope is None else weight.mul_(tile.slope)
