"""Rules that look ahead through the softmax and the values: to the output of the head, or to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.rules.threshold import ThresholdForm
from torchlamp.rules.tile import Tile
from torchlamp.rules.weighted import WeightRule

#: Beyond it e^d overflows in float32, and the output has long arrived at v_j.
_LARGEST = 80.0


@dataclass(frozen=True)
class RunningOutput(WeightRule):
    """`running-output:T`: recompute j iff z_j s_j ||v_j - o|| / ||o|| r_j > T, o = sum_j z_j v_j.

    The change of a head's output by an error in y_j is do = z_j s_j (v_j - o) dy_j: a key whose value equals the
    output needs no accuracy, whatever its probability. r_j is the running error of `running`. T >= 0 is a relative
    error of one head's output.

    Source: derived, docs/method.md 4.9.
    """

    threshold: float
    name = "running-output"
    examples = ("running-output:0.01", "running-output:0.001")
    looks_through = "attention"
    operations = 8.0
    byproducts = frozenset({"squares"})
    further_work = frozenset({"distances"})

    def weight(self, tile: Tile) -> Tensor:
        """Change of the output per unit of error, times the expected rounding error."""
        weight = tile.probabilities * tile.output_distance * tile.error
        return weight if tile.slope is None else weight * tile.slope


@dataclass(frozen=True)
class RunningResidual(WeightRule):
    """`running-residual:T`: recompute j iff m_j ||G W_h (v_j - o)|| / ||G x|| > T, m_j from z_j and r_j.

    One step further than `running-output`: W_h is the block of the output projection that belongs to the head, x
    the residual stream that its result is added to, G the weight of the norm that reads the stream next. So heads and
    layers that change the stream little get little, and one T shares the budget between all of them. Where a norm
    stands between projection and stream (Gemma), its factor is part of the weight (docs/method.md 4.9). And errors need
    not be small: m_j is the exact mean response of the output to y_j + r_j and y_j - r_j (`response`), not z_j r_j.

    T >= 0 is a relative error of what is read of the residual stream.

    Source: derived, docs/method.md 4.9.
    """

    threshold: float
    name = "running-residual"
    examples = ("running-residual:0.001", "running-residual:0.0001")
    looks_through = "attention"
    operations = 17.0
    byproducts = frozenset({"squares"})
    reads_residual_stream = True
    further_work = frozenset({"distances"})

    def weight(self, tile: Tile) -> Tensor:
        """Change of the residual stream by an error of the expected size."""
        return response(tile, tile.error) * tile.distance

    def threshold_form(self) -> ThresholdForm:
        """Weight "running-residual"."""
        return ThresholdForm("running-residual", self.threshold)


@dataclass(frozen=True)
class BridgeResidual(RunningResidual):
    """`bridge-residual:T`: `running-residual` with the error estimate of `bridge`.

    It needs no by-product of the accumulation. T >= 0 is a relative error of what is read of the residual stream.

    Source: derived, docs/method.md 4.8 and 4.9.
    """

    name = "bridge-residual"
    examples = ("bridge-residual:0.001", "bridge-residual:0.0001")
    operations = 20.0
    byproducts = frozenset()
    further_work = frozenset({"distances", "norms"})

    def weight(self, tile: Tile) -> Tensor:
        """Change of the residual stream by an error of the size that norms tell."""
        return response(tile, tile.bridge_error) * tile.distance

    def threshold_form(self) -> ThresholdForm:
        """Weight "bridge-residual"."""
        return ThresholdForm("bridge-residual", self.threshold)


def response(tile: Tile, error: Tensor) -> Tensor:
    """How far the output moves towards v_j if y_j errs by +-error_j: the mean of both signs, a new tensor.

    If only l_j changes, by d, then exactly z_j' = z_j e^d / (1 + z_j (e^d - 1)) and o' = o + m (v_j - o) with
    m = (z_j' - z_j) / (1 - z_j) = z_j (e^d - 1) / (1 + z_j (e^d - 1)). For small d that is z_j d. The softcap enters
    by its slope, d = s_j error_j.
    """
    change = (error if tile.slope is None else error * tile.slope).clamp_max(_LARGEST)
    return (_move(tile.probabilities, change) - _move(tile.probabilities, -change)).mul_(0.5)


def move(tile: Tile, error: Tensor) -> Tensor:
    """The same for an error whose sign is known; at least 0."""
    change = (error if tile.slope is None else error * tile.slope).clamp_max(_LARGEST)
    return _move(tile.probabilities, change).abs()


def _move(z: Tensor, change: Tensor) -> Tensor:
    # As (1 - z) + z e^d the denominator stays above 0 where z is 1 and e^d small: 1 + z (e^d - 1) would not.
    return torch.expm1(change).mul_(z) / ((1 - z) + z * torch.exp(change))
