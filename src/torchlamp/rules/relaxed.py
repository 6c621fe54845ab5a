"""The relaxed rules of LAMP: a threshold relative to the row's largest weight, without the softmax's sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.products import WITHOUT_FLOAT64
from torchlamp.rules.rule import NumberRule
from torchlamp.rules.threshold import ThresholdForm, exceeds
from torchlamp.rules.tile import Tile

#: Row length at which `relaxed-length:T` has exactly the threshold T. The published code has this number too,
#: whatever the model's context is; it is the length of the windows of its experiments.
REFERENCE_LENGTH = 1024


@dataclass(frozen=True)
class Relaxed(NumberRule):
    """`relaxed:T`: recompute j iff |y_j| s_j e^(l_j - L) > T max_i |y_i| s_i e^(l_i - L), L = max l.

    From the strict weight 2 z (1 - z) |y| s by dropping 1 - z <= 1, and then the factor 2 / sum_i e^(l_i - L)
    that the row has in common, which a threshold relative to the row's maximum makes irrelevant. A
    streaming kernel needs a running maximum and no sum. l is the logit (y, or softcap(y), plus a bias), s_j
    the slope of the softcap (1 without one). Subtracting L scales both sides alike and keeps them finite.

    T in [0, 1] is the share of the row's largest weight up to which an entry stays low. For T < 1 every row
    recomputes at least one entry, unless all its weights are 0; T = 1 recomputes nothing. NaN and infinite
    scores are selected; if a row's largest weight is NaN, so is its whole row.

    Source: arXiv 2601.21623 v2 (the rule as published, there with e^y unshifted); derived, docs/method.md.
    """

    threshold: float
    name = "relaxed"
    role = "published"
    examples = ("relaxed:0.03", "relaxed:0.3")
    allowed = (0.0, 1.0)
    operations = 5.0

    def select(self, tile: Tile) -> Tensor:
        """Entries whose weight exceeds T times the largest of their row."""
        weight, largest = _weight(tile)
        return exceeds(tile, weight, self.threshold * largest)

    def threshold_form(self) -> ThresholdForm:
        """Weight "relaxed"."""
        return ThresholdForm("relaxed", self.threshold)


@dataclass(frozen=True)
class RelaxedLength(NumberRule):
    """`relaxed-length:T`: the relaxed rule with T_i = min(1, T sqrt(1024 / n_i)), n_i visible keys in row i.

    If the errors left in a row are independent and each is worth up to T times the largest, their root mean
    square sum grows like sqrt(n_i) T; this T_i holds it level. Rows shorter than 1024 (`REFERENCE_LENGTH`)
    get a higher threshold than T, longer rows a lower one; a row with n_i <= 1024 T^2 reaches T_i = 1 and
    recomputes nothing.

    T in [0, 1] is the threshold of a row with 1024 visible keys. NaN as in `Relaxed`.

    Source: arXiv 2601.21623 v2 (the rule as published); reason derived, docs/method.md.
    """

    threshold: float
    name = "relaxed-length"
    role = "published"
    examples = ("relaxed-length:0.03", "relaxed-length:0.3")
    allowed = (0.0, 1.0)
    operations = 5.0

    def select(self, tile: Tile) -> Tensor:
        """Entries whose weight exceeds T_i times the largest of their row."""
        weight, largest = _weight(tile)
        length = tile.visible.sum(dim=-1, keepdim=True)
        if length.device.type in WITHOUT_FLOAT64:
            length = length.cpu()
        share = (self.threshold * (REFERENCE_LENGTH / length.to(torch.float64)).sqrt()).clamp(max=1.0)
        return exceeds(tile, weight, share.to(largest) * largest)

    def threshold_form(self) -> ThresholdForm:
        """Weight "relaxed", by length."""
        return ThresholdForm("relaxed", self.threshold, by_length=True)


def _weight(tile: Tile) -> tuple[Tensor, Tensor]:
    """Weights (..., rows, keys), 0 where not visible, and the largest of each row (..., rows, 1)."""
    if tile.scores.shape[-1] == 0:  # a maximum over nothing is an error in torch
        return tile.scores, tile.scores.new_zeros(*tile.scores.shape[:-1], 1)
    hidden = ~tile.visible
    weight = tile.logits.masked_fill(hidden, -torch.inf)
    weight -= weight.amax(dim=-1, keepdim=True)
    weight.exp_().mul_(tile.scores.abs())
    if tile.slope is not None:
        weight *= tile.slope
    weight.masked_fill_(hidden, 0.0)
    return weight, weight.amax(dim=-1, keepdim=True)
