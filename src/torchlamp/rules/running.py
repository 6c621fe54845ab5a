"""The running-error rule: the strict rule with an estimate of each score's own rounding error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.threshold import ThresholdForm
from torchlamp.rules.tile import Tile
from torchlamp.rules.weighted import WeightRule


@dataclass(frozen=True)
class Running(WeightRule):
    """`running:T`: recompute j iff 2 z_j (1 - z_j) s_j r_j > T, r_j the expected rounding error of y_j.

    2 z_j (1 - z_j) s_j is the l1 change of the probabilities per unit of absolute error in y_j, s_j the
    slope of a softcap (1 without one). The error is not assumed proportional to |y_j| but estimated from the
    sum's own course: with partial sums a_k (after rounding) and unit roundoff u = 2^-(mantissa bits + 1),

        r = (u / 2) sqrt(sum_k a_k^2) |scaling|,

    since step k errs by at most u |a_k|, about half of that on average, with random sign. An estimate, not a
    bound: errors of one sign (many small terms added to a large sum) add up to more. The attention composition
    computes it from the accumulation's running sum of squares and gives it as `tile.error`.

    At other sites the tile's own gain stands in the place of 2 z (1 - z) s.

    T >= 0 is an l1 error of a row of probabilities, absolute: one T means the same at every format, head and
    layer. NaN and infinite scores are selected.

    Source: derived (Wilkinson's running error analysis in a probabilistic form), docs/method.md 4.5.
    """

    threshold: float
    name = "running"
    examples = ("running:0.001", "running:0.0001")
    looks_through = "any"
    operations = 6.0
    byproducts = frozenset({"squares"})

    def weight(self, tile: Tile) -> Tensor:
        """Gain times the expected rounding error."""
        return tile.gain * tile.error

    def threshold_form(self) -> ThresholdForm:
        """Weight "running"."""
        return ThresholdForm("running", self.threshold)
