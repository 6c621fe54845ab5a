"""The data of every figure of a report, as tables: the CSV beside a picture is what the page draws, too."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from torchlamp.report.data import GROUP, ReportData
from torchlamp.report.style import order, rule_role
from torchlamp.report.tables import at_rates, equal_rate, rates_of
from torchlamp.results.result import POSITION_BIN

#: Maps by head and position show the point of each rule whose recompute rate is nearest to this.
TYPICAL_RATE = 0.01
#: Transforms are compared at the point of each rule whose recompute rate is nearest to this.
TRANSFORM_RATE = 0.03
#: Column of a vertical axis -> its words.
METRICS = {"kl": "KL(reference || tested) per token, nats", "flip": "flip rate"}
#: Column of a horizontal axis of `curves` -> its words.
AXES = {
    "rate": "recompute rate",
    "cost_entry": "cost, entry by entry",
    "cost_row_block_16": "cost, row blocks of 16 keys",
    "cost_tile_16x16": "cost, tiles of 16 x 16",
}


@dataclass(frozen=True)
class FigureData:
    """The table of one figure.

    Attributes
    ----------
    kind : str
        "curves", "transforms", "mu", "heads", "positions", "layers" or "sites": the function ``<kind>_data`` names
        the columns.
    group : tuple of str
        Model, text and kind of tokens.
    site : str
        The site, empty where a figure shows several.
    table : DataFrame
        In the order in which it is drawn.
    """

    kind: str
    group: tuple[str, str, str]
    site: str
    table: pd.DataFrame


def figures_data(data: ReportData) -> Iterator[FigureData]:
    """The data of every figure that the points have any for, experiment by experiment."""
    rates = equal_rate(data.points)
    for group, points in data.points.groupby(GROUP, sort=False):
        whole = points[points["layers"] == "all"]
        own_rates = rates[(rates[GROUP] == list(group)).all(axis=1) & (rates["layers"] == "all")]
        for site, part in whole.groupby("site", sort=False):
            yield FigureData("curves", group, str(site), curves_data(part))
            if len(transforms := transforms_data(part)):
                yield FigureData("transforms", group, str(site), transforms)
            by_mu = mu_data(part, own_rates[own_rates["site"] == site])
            if by_mu["mu"].nunique() > 1:
                yield FigureData("mu", group, str(site), by_mu)
            if len(heads := heads_data(part)):
                yield FigureData("heads", group, str(site), heads)
            if len(positions := positions_data(part)):
                yield FigureData("positions", group, str(site), positions)
        single = points[points["layers"].str.fullmatch(r"\d+")]
        if len(single):
            yield FigureData("layers", group, "", layers_data(single))
        narrow = whole[(whole["rule"] == "none") & ~whole["site"].str.contains("+", regex=False)]
        if narrow["site"].nunique() > 1:
            yield FigureData("sites", group, "", sites_data(narrow))


def accumulators(points: pd.DataFrame) -> list[str]:
    """Accumulators by mantissa bits, narrow ones first; those without a number of bits of their own last."""
    return list(points.sort_values(["mu", "accumulate"])["accumulate"].unique())


def selecting(points: pd.DataFrame) -> pd.DataFrame:
    """The points whose rule recomputes some entries and not all: those of curves."""
    return points[(points["rate"] > 0) & (points["rate"] < 1)]


def usual_accumulator(points: pd.DataFrame) -> str:
    """The accumulator of most policies; ps4, the published study's, if it is one of several."""
    most = list(points.drop_duplicates(["accumulate", "policy"])["accumulate"].mode())
    return "ps4" if "ps4" in most else str(most[0])


def curves_data(points: pd.DataFrame) -> pd.DataFrame:
    """The points of all curves, uniform precision (rule none) among them."""
    columns = ["accumulate", "mu", "rule", "policy", "realisable", "rate", "kl", "kl_se", "flip", "flip_se"]
    costs = [name for name in points.columns if name.startswith("cost_")]
    table = points[columns + costs].sort_values(["mu", "accumulate", "rate"])
    return table.sort_values("rule", key=_orders, kind="stable").reset_index(drop=True)


def mu_data(points: pd.DataFrame, at_rates: pd.DataFrame) -> pd.DataFrame:
    """KL and flips by mantissa bits: uniform precision, everything recomputed, and each rule at equal rates.

    Parameters
    ----------
    points : DataFrame
        Of one site.
    at_rates : DataFrame
        The part of `equal_rate` of that site.
    """
    ends = points[points["rule"].isin(["none", "all"])]
    ends = ends.assign(rate=(ends["rule"] == "all").astype(float))
    columns = ["accumulate", "mu", "rule", "rate", "kl", "kl_se", "flip", "flip_se"]
    parts = [part[columns] for part in (ends, at_rates) if len(part)]
    table = pd.concat(parts) if parts else pd.DataFrame(columns=columns)
    table = table.dropna(subset=["mu", "kl"]).sort_values(["rate", "mu"])
    return table.sort_values("rule", key=_orders, kind="stable").reset_index(drop=True)


def typical_points(points: pd.DataFrame) -> pd.DataFrame:
    """Of each realisable rule that is no control, the point nearest to `TYPICAL_RATE` at each accumulator."""
    chosen = selecting(points)
    chosen = chosen[~chosen["rule"].map(rule_role).isin(["control", "oracle"])]
    distance = (chosen["rate"] / TYPICAL_RATE).map(lambda ratio: abs(math.log(ratio)))
    nearest = distance.groupby([chosen["accumulate"], chosen["rule"]]).idxmin()
    typical = chosen.loc[nearest].sort_values(["mu", "accumulate"])
    return typical.sort_values("rule", key=_orders, kind="stable")


def heads_data(points: pd.DataFrame) -> pd.DataFrame:
    """One row a point with rates by head: `by_head`, layers x heads, and whether it is a typical one."""
    table = selecting(points)
    table = table[table["by_head"].map(lambda layers: any(map(len, layers))).astype(bool)]
    table = table.assign(typical=table.index.isin(typical_points(points).index))
    table = table.sort_values(["mu", "accumulate", "rate"]).sort_values("rule", key=_orders, kind="stable")
    return table[["accumulate", "policy", "rule", "rate", "typical", "by_head"]].reset_index(drop=True)


def unrolled_heads(heads: pd.DataFrame) -> pd.DataFrame:
    """One row a layer and head of each typical point of `heads_data`, at the accumulator of most of them."""
    typical = heads[heads["typical"]]
    if len(typical):
        typical = typical[typical["accumulate"] == usual_accumulator(typical)]
    rows = [
        {"policy": point.policy, "rule": point.rule, "layer": layer, "head": head, "rate": rate}
        for point in typical.itertuples()
        for layer, rates in enumerate(point.by_head)
        for head, rate in enumerate(rates)
    ]
    return pd.DataFrame(rows, columns=["policy", "rule", "layer", "head", "rate"])


def positions_data(points: pd.DataFrame, bin_width: int = POSITION_BIN) -> pd.DataFrame:
    """One row a bin of positions of each rule at the accumulator's equal rate; `position` is the bin's middle.

    Bins are interpolated as `at_rates` does, between points of the rule on both sides of the rate, and `policy` names
    the rule and accumulator. `at` is the recompute rate over all positions, which all curves of an accumulator share.
    Where no two rules share a rate, each rule's typical point is taken, with its own policy and rate.
    """
    rows = []
    chosen = selecting(points)
    chosen = chosen[~chosen["rule"].map(rule_role).isin(["control", "oracle"])]
    chosen = chosen[chosen["by_position"].map(len) > 1]
    for accumulate in accumulators(chosen):
        part = chosen[chosen["accumulate"] == accumulate]
        for rule, policy, at, rates in _rates_by_position(part):
            rows += [
                {
                    "accumulate": accumulate,
                    "policy": policy,
                    "rule": rule,
                    "at": at,
                    "position": (i + 0.5) * bin_width,
                    "rate": rate,
                }
                for i, rate in enumerate(rates)
            ]
    return pd.DataFrame(rows, columns=["accumulate", "policy", "rule", "at", "position", "rate"])


def _rates_by_position(points: pd.DataFrame) -> list[tuple[str, str, float, list[float]]]:
    """Rule, policy, overall rate and rates by position of one accumulator's rules, in the order of `style.order`."""
    curves = {str(rule): curve for rule, curve in points.groupby("rule")}
    candidates = rates_of(points, [])
    found: dict[float, list[tuple[str, str, float, list[float]]]] = {rate: [] for rate in candidates}
    for rule in sorted(curves, key=order):
        curve = curves[rule]
        name = f"{curve['accumulate'].iloc[0]}+{rule}"
        for rate, inside in zip(
            candidates, at_rates(curve["rate"].tolist(), curve["rate"], candidates), strict=True
        ):
            if math.isfinite(inside):
                bins = zip(*curve["by_position"], strict=False)
                values = [float(at_rates(curve["rate"].tolist(), list(own), [rate])[0]) for own in bins]
                found[rate].append((rule, name, rate, values))
    shared = [rate for rate in candidates if len(found[rate]) > 1]
    if shared:
        best = max(shared, key=lambda rate: (len(found[rate]), -abs(math.log(rate / TYPICAL_RATE))))
        return found[best]
    return [
        (str(point.rule), str(point.policy), float(point.rate), list(point.by_position))
        for point in typical_points(points).itertuples()
    ]


def transforms_data(points: pd.DataFrame) -> pd.DataFrame:
    """Each transform of an accumulator: nothing recomputed, and each realisable rule at its point nearest to 3 %.

    `times` is the KL of the accumulator without a transform, nothing recomputed, over the row's KL. Accumulators
    that were measured under one transform alone are left out.
    """
    columns = [
        "untransformed",
        "transform",
        "accumulate",
        "rule",
        "policy",
        "rate",
        "kl",
        "kl_se",
        "flip",
        "flip_se",
    ]
    own = points[points["realisable"] & (points["rate"] < 1)]
    own = own[(own["rule"] == "none") | (own["rule"].map(rule_role) != "control")]
    counts = own.drop_duplicates(["untransformed", "transform"])["untransformed"].value_counts()
    own = own[own["untransformed"].isin(counts[counts > 1].index)]
    if not len(own):
        return pd.DataFrame(columns=[*columns, "times"])
    distance = own["rate"].map(lambda rate: abs(math.log(max(rate, 1e-12) / TRANSFORM_RATE)))
    table = own.loc[distance.groupby([own["accumulate"], own["rule"]]).idxmin().sort_values(), columns]
    plain = table[(table["transform"] == "none") & (table["rule"] == "none")].set_index("untransformed")["kl"]
    levels = [plain.get(name, math.nan) for name in table["untransformed"]]
    table = table.assign(times=levels / table["kl"])
    level = table["kl"].where(table["rule"] == "none").groupby([table["untransformed"], table["transform"]])
    table = table.assign(first=table["transform"] != "none", level=level.transform("max").fillna(math.inf))
    table = table.sort_values(
        ["untransformed", "first", "level", "transform"], ascending=[True, True, False, True]
    )
    return table[[*columns, "times"]].reset_index(drop=True)


def layers_data(points: pd.DataFrame) -> pd.DataFrame:
    """One row a layer and policy; `label` names the site too, and `line` counts the policies of a rule."""
    columns = ["site", "policy", "accumulate", "rule", "layers", "kl", "kl_se", "flip", "flip_se", "rate"]
    table = points[columns].copy()
    table["layer"] = table.pop("layers").astype(int)
    named = table["policy"].str.contains("=", regex=False)
    table["label"] = table["policy"].where(named, table["site"] + "=" + table["policy"])
    table = table.sort_values(["rule", "label", "layer"])
    lines = table.groupby("rule")["label"].transform(lambda labels: pd.factorize(labels)[0])
    return table.assign(line=lines.astype(int)).reset_index(drop=True)


def sites_data(points: pd.DataFrame) -> pd.DataFrame:
    """One row a site and accumulator, the site with the largest KL first, there the narrowest accumulator first."""
    columns = ["site", "accumulate", "mu", "kl", "kl_se", "flip", "flip_se"]
    worst = points.groupby("site")["kl"].transform("max")
    table = points.assign(worst=worst).sort_values(
        ["worst", "site", "mu", "accumulate"], ascending=[False, True, True, True]
    )
    return table[columns].reset_index(drop=True)


def _orders(labels: pd.Series) -> pd.Series:
    """Sort keys of rules' labels: their ranks in the order of `style.order`."""
    ranks = {label: rank for rank, label in enumerate(sorted(labels.unique(), key=order))}
    return labels.map(ranks)
