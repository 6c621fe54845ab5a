"""Means, errors and percentiles of the per-token figures of many windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.evaluation.metrics import TokenMetrics

#: Percentiles reported, and their names in JSON.
PERCENTILES = {"1": 1.0, "5": 5.0, "50": 50.0, "95": 95.0, "99": 99.0, "99.9": 99.9, "max": 100.0}


@dataclass(frozen=True)
class Figures:
    """What the tokens of a run add up to; the names and units are those of `Result`."""

    kl_mean: float
    kl_standard_error: float
    kl_token_standard_error: float
    kl_percentiles: dict[str, float]
    flip_rate: float
    flip_standard_error: float
    perplexity: float
    reference_perplexity: float
    log_perplexity_ratio: float
    log_perplexity_ratio_standard_error: float
    rms_delta_p: float


def mean_and_error(windows: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over all tokens, and its standard error.

    Tokens of a window share their context, so their figures are not independent. With two windows or more the
    error is that of the mean over the windows' means (windows of equal length); with one, that of a mean over
    independent tokens, which is too small.
    """
    if len(windows) >= 2:
        means = torch.stack([w.mean() for w in windows])
        return float(means.mean()), float(means.std() / math.sqrt(len(windows)))
    return float(windows[0].mean()), _token_error(windows[0])


def aggregate(windows: Sequence[TokenMetrics]) -> Figures:
    """Aggregate one run over its windows (at least one, all of one length)."""
    kl = torch.cat([w.kl for w in windows])
    flips = torch.cat([w.flips for w in windows]).double()
    delta = torch.cat([w.delta_p for w in windows])
    kl_mean, kl_error = mean_and_error([w.kl for w in windows])
    entropy, _ = mean_and_error([w.cross_entropy for w in windows])
    reference_entropy, _ = mean_and_error([w.reference_cross_entropy for w in windows])
    ratio, ratio_error = mean_and_error([w.cross_entropy - w.reference_cross_entropy for w in windows])
    flip_rate = float(flips.mean())
    return Figures(
        kl_mean=kl_mean,
        kl_standard_error=kl_error,
        kl_token_standard_error=_token_error(kl),
        kl_percentiles=percentiles(kl),
        flip_rate=flip_rate,
        flip_standard_error=math.sqrt(flip_rate * (1 - flip_rate) / len(flips)),
        perplexity=_exp(entropy),
        reference_perplexity=_exp(reference_entropy),
        log_perplexity_ratio=ratio,
        log_perplexity_ratio_standard_error=ratio_error,
        rms_delta_p=float(delta.square().mean().sqrt()),
    )


def percentiles(values: Tensor) -> dict[str, float]:
    """The percentiles of `PERCENTILES`, interpolated linearly between the two nearest values."""
    ordered = values.sort().values
    if bool(ordered.isnan().any()):
        return dict.fromkeys(PERCENTILES, math.nan)
    # torch.quantile refuses more than 16 million values.
    result = {}
    for name, percent in PERCENTILES.items():
        place = percent / 100 * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        below, above = float(ordered[low]), float(ordered[high])
        # Where nothing is to be interpolated, an infinite neighbour would still turn the sum into NaN.
        result[name] = below if below == above or place == low else below + (above - below) * (place - low)
    return result


def _token_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) >= 2 else math.nan


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
