"""The data of every figure of a report, as tables: the CSV beside a picture is what the page draws, too."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from torchlamp.report.data import GROUP, ReportData
from torchlamp.report.style import order, rule_role
from torchlamp.report.tables import equal_rate
from torchlamp.results.result import POSITION_BIN

#: Maps by head and position show the point of each rule whose recompute rate is nearest to this.
TYPICAL_RATE = 0.01
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
        "curves", "mu", "heads", "positions", "layers" or "sites": the function ``<kind>_data`` names the columns.
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
    """One row a bin of positions of each typical point with several; `position` is the bin's middle."""
    rows = [
        {
            "accumulate": point.accumulate,
            "policy": point.policy,
            "rule": point.rule,
            "position": (i + 0.5) * bin_width,
            "rate": rate,
        }
        for point in typical_points(points).itertuples()
        for i, rate in enumerate(point.by_position)
        if len(point.by_position) > 1
    ]
    return pd.DataFrame(rows, columns=["accumulate", "policy", "rule", "position", "rate"])


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
