"""What each figure of a report shows, as a table: the CSV beside the picture."""

import math

import pandas as pd

from torchlamp.report.style import order, rule_role
from torchlamp.results.result import POSITION_BIN

#: Maps by head and position show the point of each rule whose recompute rate is nearest to this.
TYPICAL_RATE = 0.01


def curve_data(points: pd.DataFrame) -> pd.DataFrame:
    """The points of all curves, uniform precision (rule none) among them."""
    columns = ["accumulate", "mu", "rule", "policy", "realisable", "rate", "kl", "kl_se", "flip", "flip_se"]
    costs = [name for name in points.columns if name.startswith("cost_")]
    return points[columns + costs].sort_values(["accumulate", "rule", "rate"]).reset_index(drop=True)


def mu_data(points: pd.DataFrame, at_rates: pd.DataFrame) -> pd.DataFrame:
    """KL by mantissa bits: uniform precision, everything recomputed, and each rule at equal recompute rates."""
    ends = points[points["rule"].isin(["none", "all"])]
    ends = ends.assign(rate=(ends["rule"] == "all").astype(float))
    columns = ["accumulate", "mu", "rule", "rate", "kl", "kl_se"]
    parts = [part[columns] for part in (ends, at_rates) if len(part)]
    table = pd.concat(parts) if parts else pd.DataFrame(columns=columns)
    return table.dropna(subset=["mu", "kl"]).sort_values(["rule", "rate", "mu"]).reset_index(drop=True)


def typical_points(points: pd.DataFrame) -> pd.DataFrame:
    """Each realisable rule's point nearest to `TYPICAL_RATE`, at the accumulator with the most points."""
    chosen = points[(points["rate"] > 0) & (points["rate"] < 1) & points["realisable"]]
    chosen = chosen[chosen["rule"].map(rule_role) != "control"]
    if not len(chosen):
        return chosen
    most = list(chosen["accumulate"].mode())
    chosen = chosen[chosen["accumulate"] == ("ps4" if "ps4" in most else most[0])]
    nearest = (chosen["rate"] / TYPICAL_RATE).map(lambda ratio: abs(math.log(ratio)))
    return chosen.loc[nearest.groupby(chosen["rule"]).idxmin()].sort_values(
        "rule", key=lambda r: r.map(order)
    )


def head_data(points: pd.DataFrame) -> pd.DataFrame:
    """One row a layer and head of each point."""
    rows = [
        {"policy": point.policy, "rule": point.rule, "layer": layer, "head": head, "rate": rate}
        for point in points.itertuples()
        for layer, heads in enumerate(point.by_head)
        for head, rate in enumerate(heads)
    ]
    return pd.DataFrame(rows, columns=["policy", "rule", "layer", "head", "rate"])


def position_data(points: pd.DataFrame, bin_width: int = POSITION_BIN) -> pd.DataFrame:
    """One row a bin of positions of each point; `position` is the bin's middle."""
    rows = [
        {"policy": point.policy, "rule": point.rule, "position": (i + 0.5) * bin_width, "rate": rate}
        for point in points.itertuples()
        for i, rate in enumerate(point.by_position)
    ]
    return pd.DataFrame(rows, columns=["policy", "rule", "position", "rate"])


def layer_data(points: pd.DataFrame) -> pd.DataFrame:
    """One row a layer and policy."""
    table = points[
        ["site", "policy", "accumulate", "rule", "layers", "kl", "kl_se", "flip", "flip_se", "rate"]
    ].copy()
    table["layer"] = table.pop("layers").astype(int)
    return table.sort_values(["policy", "layer"]).reset_index(drop=True)


def site_data(points: pd.DataFrame) -> pd.DataFrame:
    """One row a site and accumulator."""
    columns = ["site", "accumulate", "mu", "kl", "kl_se", "flip", "flip_se"]
    return points[columns].sort_values(["mu", "site"]).reset_index(drop=True)
