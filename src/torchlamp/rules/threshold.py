"""The common form of the threshold rules, shared with the native attention kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchlamp.rules.tile import Tile

Weight = Literal["strict", "relaxed", "running", "topz", "bridge", "running-residual", "bridge-residual"]


@dataclass(frozen=True)
class ThresholdForm:
    """A rule as "recompute where a weight exceeds a threshold", exact enough for a kernel to repeat it.

    With z, y, l, r, s the tile's probabilities, scores, logits, error and slope (where the tile has no slope
    its factor is left out), the weight w_j of entry j in float32, evaluated from left to right, is

        strict    (1 - z_j) z_j 2 s_j |y_j|      compared with  T
        running   (1 - z_j) z_j 2 s_j r_j        compared with  T
        bridge    (1 - z_j) z_j 2 s_j b_j        compared with  T
        topz      z_j                            compared with  T
        relaxed   e^(l_j - L) |y_j| s_j          compared with  T_i max_i w_i

    and, with m the response of `RunningResidual` and x the tile's distance,

        running-residual    m(z_j, s_j r_j) x_j    compared with  T
        bridge-residual     m(z_j, s_j b_j) x_j    compared with  T

    where b is the tile's bridge_error, L the row's largest visible logit, max_i w_i the row's largest visible
    weight (NaN if any visible weight is NaN), and T_i = T, or with `by_length` min(1, T sqrt(1024 / n)), n the row's
    number of visible keys (formed in float64, rounded once to float32). T is rounded to float32 once.

    Entry j is selected iff it is visible and (not w_j <= its threshold, or y_j is NaN or infinite): an entry
    whose error can't be bounded is recomputed. The one exception is T = +inf, which selects nothing at all,
    whatever the values are. T = -1 with the weight topz selects everything visible.

    With `drawn` all that only says how many entries of a row are selected: these are the visible ones with the lowest
    draws of the tile's generator, equal draws in the order of their keys (`RandomLike`).
    """

    weight: Weight
    threshold: float
    by_length: bool = False
    drawn: bool = False


def exceeds(tile: Tile, weight: Tensor, threshold: float | Tensor) -> Tensor:
    """Visible entries whose weight exceeds the threshold or is NaN, or whose score is not finite.

    Parameters
    ----------
    tile
        For `visible` and `scores`.
    weight
        (..., rows, keys).
    threshold
        A number, or a tensor broadcastable to `weight`.

    Returns
    -------
    bool, the shape of `weight`.
    """
    # A comparison with NaN is false, so the question is asked the other way round: what may stay low?
    stays = weight <= threshold
    stays &= tile.scores.abs() < torch.inf
    return stays.logical_not_().logical_and_(tile.visible)
