"""The running-error rule: the strict rule with an estimate of each score's own rounding error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.rule import NumberRule
from torchlamp.rules.threshold import ThresholdForm, exceeds
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class Running(NumberRule):
    """`running:T`: recompute j iff 2 z_j (1 - z_j) s_j r_j > T, r_j the expected rounding error of y_j.

    2 z_j (1 - z_j) s_j is the l1 change of the probabilities per unit of absolute error in y_j, s_j the
    slope of a softcap (1 without one). The error is not assumed proportional to |y_j| but estimated from the
    sum's own course: with partial sums a_k (after rounding) and unit roundoff u = 2^-(mantissa bits + 1),

        r = (u / 2) sqrt(sum_k a_k^2) |scaling|,

    since step k errs by at most u |a_k|, about half of that on average, with random sign. An estimate, not a
    bound: errors of one sign (many small terms added to a large sum) add up to more. The attention composition
    computes it from the accumulation's running sum of squares and gives it as `tile.error`.

    T >= 0 is an l1 error of a row of probabilities, absolute: one T means the same at every format, head and
    layer. NaN and infinite scores are selected.

    Source: derived (Wilkinson's running error analysis in a probabilistic form), docs/method.md.
    """

    threshold: float
    name = "running"
    examples = ("running:0.001", "running:0.0001")
    needs_error = True

    def select(self, tile: Tile) -> Tensor:
        """Entries whose estimated contribution to the l1 error exceeds T.

        Raises
        ------
        ValueError
            If the tile has no `error`.
        """
        if tile.error is None:
            raise ValueError(f"rule '{self}' needs the running error: give the tile `error`")
        z = tile.probabilities
        half_weight = (1 - z).mul_(z).mul_(tile.error)
        if tile.slope is not None:
            half_weight.mul_(tile.slope)
        return exceeds(tile, half_weight, self.threshold / 2)

    def threshold_form(self) -> ThresholdForm:
        """Weight "running"."""
        return ThresholdForm("running", self.threshold)
