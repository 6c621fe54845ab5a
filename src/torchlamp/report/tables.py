"""The tables of a report: the figures of every point, and rules compared at equal recompute rate."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from torchlamp.report.data import GROUP
from torchlamp.report.style import BASE, order

#: Recompute rates at which rules are compared, where their points are around them.
RATES = (0.005, 0.01, 0.02, 0.04, 0.06)
#: And these, where the points have other rates.
OTHER_RATES = (1e-4, 2e-4, 5e-4, 0.001, 0.002, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
#: Neighbours farther apart than this factor in rate don't tell what lies between them.
WIDEST_GAP = 4.0
#: The columns that a curve shares: one experiment, one site, one accumulator.
CURVE = [*GROUP, "site", "layers", "accumulate"]


def at_rates(rates: Sequence[float], values: Any, wanted: Sequence[float]) -> np.ndarray:
    """Values of curves at wanted rates: linear in log rate and log value between neighbours, NaN outside.

    NaN too where the neighbours' rates differ by more than a factor of `WIDEST_GAP`: curves bend.

    Points at which the rate or a value is not positive and finite have no logarithm and are left out; of points at
    one rate the mean of the logarithms counts.

    Parameters
    ----------
    rates : sequence of float
        Of the n points.
    values : array
        (n,) or (n, curves).
    wanted : sequence of float
        The m rates to interpolate at.

    Returns
    -------
    array
        (m,) or (m, curves).
    """
    x, y = np.asarray(rates, dtype=float), np.asarray(values, dtype=float)
    table = y.reshape(len(x), -1)
    good = np.isfinite(x) & (x > 0) & (np.isfinite(table) & (table > 0)).all(axis=1)
    found = np.full((len(wanted), table.shape[1]), np.nan)
    if good.any():
        logs, index = np.unique(np.log(x[good]), return_inverse=True)
        sums = np.zeros((len(logs), table.shape[1]))
        np.add.at(sums, index, np.log(table[good]))
        means = sums / np.bincount(index)[:, None]
        targets = np.log(np.asarray(wanted, dtype=float))
        # A rate that a bisection hit to the last digit but one is on the curve.
        inside = (targets >= logs[0] - 1e-9) & (targets <= logs[-1] + 1e-9)
        right = np.clip(np.searchsorted(logs, targets - 1e-9), 1, max(len(logs) - 1, 1))
        if len(logs) > 1:
            met = np.abs(logs[:, None] - targets).min(axis=0) < 1e-6
            inside &= met | (logs[right] - logs[right - 1] <= np.log(WIDEST_GAP) + 1e-9)
        for curve in range(table.shape[1]):
            found[inside, curve] = np.exp(np.interp(targets[inside], logs, means[:, curve]))
    return found[:, 0] if y.ndim == 1 else found


def rates_of(points: pd.DataFrame, curve: Sequence[str] = CURVE) -> tuple[float, ...]:
    """Of `RATES` and `OTHER_RATES` those that lie within some rule's curve, ascending; `curve` tells curves apart."""
    selecting = points[(points["rate"] > 0) & (points["rate"] < 1)]
    rates = selecting.groupby([*curve, "rule"], sort=False)["rate"]
    ends = list(zip(rates.min(), rates.max(), strict=True))
    near = 1 + 1e-9
    candidates = sorted((*RATES, *OTHER_RATES))
    return tuple(
        rate for rate in candidates if any(low <= rate * near and rate <= high * near for low, high in ends)
    )


def equal_rate(points: pd.DataFrame, rates: Sequence[float] | None = None) -> pd.DataFrame:
    """KL and flip rate of every rule, interpolated at equal recompute rates, and their ratio to `strict`'s.

    `rates` are `rates_of(points)` unless given.

    Errors are jackknife estimates over windows, paired: leaving window w out changes both rules' means together, so
    that what makes a window hard for all rules cancels in the ratio. The recompute rates of the points are taken as
    exact. Fewer than two windows give NaN.

    Returns
    -------
    DataFrame
        Columns of `CURVE`, mu, rule, realisable, rate, and for metric kl and flip: <metric>, <metric>_se,
        <metric>_ratio, <metric>_ratio_se, <metric>_best (the smallest ratio of all realisable rules); rows where the
        rule has no value at the rate are left out.
    """
    rates = rates_of(points) if rates is None else rates
    tables = []
    for key, part in points[points["rate"] > 0].groupby(CURVE, sort=False):
        curves = {str(rule): curve for rule, curve in part.groupby("rule", sort=False)}
        known = {
            (rule, metric): (_values(curve, metric, rates), _left_out(curve, metric, rates))
            for rule, curve in curves.items()
            for metric in ("kl", "flip")
        }
        for rule, curve in curves.items():
            table = pd.DataFrame(dict(zip(CURVE, key, strict=True)), index=range(len(rates)))
            table = table.assign(
                mu=part["mu"].iloc[0], rule=rule, realisable=bool(curve["realisable"].all()), rate=rates
            )
            for metric in ("kl", "flip"):
                value, without = known[rule, metric]
                base, base_without = known.get(
                    (BASE, metric), (np.full(len(rates), np.nan), np.empty((len(rates), 0)))
                )
                table[metric], table[f"{metric}_se"] = value, _jackknife(without)
                with np.errstate(invalid="ignore", divide="ignore"):
                    table[f"{metric}_ratio"] = value / base
                    paired = without.shape == base_without.shape
                    table[f"{metric}_ratio_se"] = _jackknife(without / base_without) if paired else math.nan
            tables.append(table[table["kl"].notna()])
    columns = [*CURVE, "mu", "rule", "realisable", "rate"]
    ends = ("", "_se", "_ratio", "_ratio_se", "_best")
    columns += [f"{metric}{end}" for metric in ("kl", "flip") for end in ends]
    tables = [table for table in tables if len(table)]
    if not tables:
        return pd.DataFrame(columns=columns)
    whole = pd.concat(tables, ignore_index=True)
    for metric in ("kl", "flip"):
        candidates = whole[f"{metric}_ratio"].where(whole["realisable"])
        smallest = candidates.groupby([whole[name] for name in (*CURVE, "rate")]).transform("min")
        whole[f"{metric}_best"] = candidates == smallest
    return whole[columns]


def _values(curve: pd.DataFrame, metric: str, rates: Sequence[float]) -> np.ndarray:
    return at_rates(curve["rate"].tolist(), curve[metric].to_numpy(dtype=float), rates)


def _left_out(curve: pd.DataFrame, metric: str, rates: Sequence[float]) -> np.ndarray:
    """(rates, windows): the interpolated value without window 0, 1, ...; no columns where windows aren't told."""
    windows = [list(values) for values in curve[f"{metric}_by_window"]]
    count = len(windows[0]) if windows else 0
    if count < 2 or any(len(values) != count for values in windows):
        return np.empty((len(rates), 0))
    table = np.asarray(windows, dtype=float)
    return at_rates(curve["rate"].tolist(), (table.sum(axis=1, keepdims=True) - table) / (count - 1), rates)


def _jackknife(left_out: np.ndarray) -> np.ndarray:
    """Standard errors (rates,) from leave-one-out values: sqrt((n - 1) / n * sum of squared deviations)."""
    n = left_out.shape[1]
    if n < 2:
        return np.full(len(left_out), np.nan)
    deviations = left_out - left_out.mean(axis=1, keepdims=True)
    return np.asarray(np.sqrt((n - 1) / n * np.square(deviations).sum(axis=1)))


def summary(points: pd.DataFrame) -> pd.DataFrame:
    """Every point in the column order of llama.cpp's perplexity tool, followed by the recompute rate.

    Whole models before single layers, narrow accumulators first, in each of them uniform precision first.

    Columns: those of `CURVE` and the policy; PPL; delta_PPL and its error; KLD and its error; KLD_99; rms_delta_p;
    same_top and its error; recompute_rate; rows_touched.
    """
    points = points.assign(
        single=points["layers"] != "all",
        layer=points["layers"].map(lambda layers: tuple(map(int, re.findall(r"\d+", layers)))),
        ruled=points["rule"] != "none",
        rank=points["rule"].map(order),
    ).sort_values(["single", "mu", "accumulate", "ruled", "rank", "rate", "layer"])
    table = points[[*CURVE, "policy", "rule"]].copy()
    table["PPL"] = points["perplexity"]
    table["delta_PPL"] = points["perplexity"] - points["reference_perplexity"]
    # d PPL = PPL d ln(PPL / PPL_reference), the reference's own perplexity taken as exact.
    table["delta_PPL_se"] = points["perplexity"] * points["log_ratio_se"]
    table["KLD"], table["KLD_se"], table["KLD_99"] = points["kl"], points["kl_se"], points["kl_99"]
    table["rms_delta_p"] = points["rms_delta_p"]
    table["same_top"], table["same_top_se"] = 1 - points["flip"], points["flip_se"]
    table["recompute_rate"], table["rows_touched"] = points["rate"], points["rows_touched"]
    return table.reset_index(drop=True)
