"""The running-error rule in an upper confidence form: for low passes whose errors aren't small."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.rules.rule import Rule, spelled
from torchlamp.rules.threshold import exceeds
from torchlamp.rules.tile import Tile

_NUMBER = r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
_PARAMETER = re.compile(f"{_NUMBER},{_NUMBER}", re.ASCII)


@dataclass(frozen=True)
class UpperRunning(Rule):
    """`upper-running:T,C`: `running:T` with the largest gain that a key could have within C standard errors.

    `running` weighs y_j by 2 z_j (1 - z_j), of probabilities z that the low pass itself made. Where its errors are
    large a wrong key may have taken the probability, and the keys that matter look as if they didn't. Here logit j may
    lie anywhere in l_j +- C s_j r_j, and all others, against it, in theirs: its log odds x_j lie between

        l_j -+ C s_j r_j - log sum_(k != j) e^(l_k +- C s_k r_k),

    a sink added to the sum as it is. Recompute j iff 2 max z (1 - z) s_j r_j > T over these odds: z (1 - z) falls
    with |x|, so that the maximum is at the odds nearest to 0. C = 0 is `running:T`.

    T >= 0 is an l1 error of a row of probabilities, C >= 0 a number of standard errors; 1 is a good start. NaN and
    infinite scores are selected.

    Raises
    ------
    ValueError
        If T or C is negative or not finite.

    Source: derived, docs/method.md 4.12.
    """

    setting: tuple[float, float]
    name = "upper-running"
    examples = ("upper-running:0.01,1", "upper-running:0.001,0.5", "upper-running:0.1,2")
    operations = 19.0
    byproducts = frozenset({"squares"})

    def __post_init__(self) -> None:
        if len(self.setting) != 2 or not all(0 <= x < math.inf for x in self.setting):
            raise ValueError(
                f"rule upper-running: setting must be two finite numbers >= 0, got {self.setting!r}"
            )
        object.__setattr__(self, "setting", tuple(float(x) + 0.0 for x in self.setting))

    @property
    def parameter(self) -> str:
        """T and C with a comma."""
        return ",".join(map(spelled, self.setting))

    @classmethod
    def from_parameter(cls, text: str | None) -> Rule:
        """Read 'T,C'."""
        match = _PARAMETER.fullmatch(text or "")
        if match is None or not all(0 <= float(x) < math.inf for x in match.groups()):
            given = cls.name if text is None else f"{cls.name}:{text}"
            raise ValueError(
                f"rule '{given}': upper-running takes two finite numbers >= 0, the threshold T and the number C of "
                f"standard errors; write for example '{cls.examples[0]}'"
            )
        return cls((float(match[1]), float(match[2])))

    def select(self, tile: Tile) -> Tensor:
        """Visible entries whose largest possible weight exceeds T.

        Raises
        ------
        ValueError
            If the tile has no `error`.
        """
        threshold, _ = self.setting
        if tile.scores.shape[-1] == 0:
            return torch.zeros_like(tile.visible)
        return exceeds(tile, self.weight(tile), threshold)

    def weight(self, tile: Tile) -> Tensor:
        """The largest gain times the expected error, a new tensor; meaningless where not visible."""
        error = tile.error if tile.slope is None else tile.error * tile.slope
        reach = self.setting[1] * error
        hidden = ~tile.visible
        low, high = ((tile.logits + x).masked_fill(hidden, -math.inf) for x in (-reach, reach))
        held = tile.probabilities.sum(-1, keepdim=True)
        # log of a sink's e^l: it holds what the keys don't.
        total = tile.logits.masked_fill(hidden, -math.inf).logsumexp(-1, keepdim=True) - held.log()
        sink = torch.where(held < 1 - 1e-5, total + (1 - held).log(), -math.inf)
        upper, lower = high - _others(low, sink), low - _others(high, sink)
        nearest = upper.clamp_max(0) + lower.clamp_min(0)
        return 2 * torch.sigmoid(nearest) * torch.sigmoid(-nearest) * error


def _others(logits: Tensor, sink: Tensor) -> Tensor:
    """Logarithm of sum_(k != j) e^(l_k), and of the sink, for every j; -inf where there is no other.

    Of a sum without one of its terms nothing is lost unless that is the largest, which is left out from the start.
    """
    top, at = logits.max(-1, keepdim=True)
    base = torch.maximum(top, sink)
    base = torch.where(base == -math.inf, 0.0, base)
    terms, aside = (logits - base).exp(), (sink - base).exp()
    without_top = terms.scatter(-1, at, 0.0).sum(-1, keepdim=True) + aside
    others = without_top + terms.gather(-1, at) - terms
    return others.scatter(-1, at, without_top).clamp_min(0).log() + base
