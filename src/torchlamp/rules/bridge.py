"""The running-error rule with an error estimate that needs nothing of the accumulation but its result."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.threshold import ThresholdForm
from torchlamp.rules.tile import Tile
from torchlamp.rules.weighted import WeightRule


@dataclass(frozen=True)
class Bridge(WeightRule):
    """`bridge:T`: recompute j iff 2 z_j (1 - z_j) s_j b_j > T, b_j an error estimate made of y_j and norms.

    `running` needs the sum of the squared partial sums a_k, a by-product of the accumulation. Here its expected
    value takes its place: partial sums walk at random from 0 to the finished sum Y = y / scaling in d steps, a
    bridge, with E a_k^2 = (k/d)^2 Y^2 + (k/d)(1 - k/d) V, V = sum_i (q_i k_ji)^2, about ||q||^2 ||k_j||^2 / d if
    sizes are spread evenly. Summed over k,

        b = (u / 2) sqrt(d Y^2 / 3 + ||q||^2 ||k_j||^2 / 6) |scaling|.

    It costs a norm per query and per key, and three operations an entry.

    T >= 0 is an l1 error of a row of probabilities, as for `running`.

    Source: derived, docs/method.md 4.8.
    """

    threshold: float
    name = "bridge"
    examples = ("bridge:0.01", "bridge:0.0001")
    operations = 9.0
    further_work = frozenset({"norms"})

    def weight(self, tile: Tile) -> Tensor:
        """Gain times the estimate."""
        return tile.gain * tile.bridge_error

    def threshold_form(self) -> ThresholdForm:
        """Weight "bridge"."""
        return ThresholdForm("bridge", self.threshold)
