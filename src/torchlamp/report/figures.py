"""The figures of a report on paper: the tables of `figures_data`, drawn with matplotlib as SVG and PNG."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from torchlamp.report.figures_data import (
    METRICS,
    FigureData,
    accumulators,
    selecting,
    unrolled_heads,
    usual_accumulator,
)
from torchlamp.report.log_axis import log_axis
from torchlamp.report.style import Style, accumulator_styles, legend_label, numbered, order, styles

#: Kind of figure -> the words of its title.
_TITLES = {
    "transforms": "KL by transform",
    "mu": "KL against mantissa bits",
    "heads": "Recompute rate by layer and head",
    "positions": "Recompute rate against position",
    "layers": "KL when only one layer is narrow",
    "sites": "KL when only one site is narrow",
}
#: Part of a curves file's name -> the column of its horizontal axis and its words.
_AXES = {"rate": ("rate", "recompute rate"), "cost": ("cost_entry", "cost")}
#: Kind of figure -> the beginning of its file's name, where it isn't the kind.
_FILES = {"mu": "kl-mu", "positions": "position"}

#: Characters of a name in a file name at most: four names, a kind and an ending share the 255 bytes that systems allow.
_MAX_WORD = 48


@dataclass(frozen=True)
class Figure:
    """A figure's file name without ending, its title, its data, and a function that draws it on a matplotlib figure."""

    name: str
    title: str
    data: pd.DataFrame
    draw: Callable[[Any, pd.DataFrame], None]


def file_names(found: FigureData) -> dict[str, str]:
    """What a figure's table gives as files: "kl-rate" and so on of curves, else its kind -> the name without ending."""
    suffix = _slug(*found.group) if found.site in ("", "scores") else _slug(*found.group, found.site)
    if found.kind != "curves":
        return {found.kind: f"{_FILES.get(found.kind, found.kind)}-{suffix}"} if len(found.table) else {}
    if not len(found.table[found.table["rate"] > 0]):
        return {}
    axes = [axis for axis in ("rate", "cost_entry") if found.table[axis].notna().any()]
    kinds = [f"{metric}-{axis.split('_')[0]}" for metric in ("kl", "flip") for axis in axes]
    return {kind: f"{kind}-{suffix}" for kind in kinds}


def figures(tables: Iterator[FigureData]) -> Iterator[Figure]:
    """The files of these tables; the curves of a site give one for each measure and axis."""
    for found in tables:
        where = ", ".join([*found.group[:2], f"{found.group[2]} tokens", *filter(None, [found.site])])
        for kind, name in file_names(found).items():
            if found.kind == "curves":
                metric, axis = kind.split("-")
                words = f"{'KL' if metric == 'kl' else metric} against {_AXES[axis][1]}: {where}"
                yield Figure(name, words, found.table, _curves(_AXES[axis][0], metric))
                continue
            table = unrolled_heads(found.table) if found.kind == "heads" else found.table
            if len(table):
                yield Figure(name, f"{_TITLES[kind]}: {where}", table, _DRAW[kind])


def save(figure: Figure, folder: Path) -> list[Path]:
    """Write a figure as CSV, SVG and PNG."""
    paths = [folder / f"{figure.name}.{end}" for end in ("csv", "svg", "png")]
    figure.data.to_csv(paths[0], index=False)
    settings: dict[Any, Any] = {
        "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.linewidth": 0.4, "grid.alpha": 0.5, "legend.frameon": False,
        "svg.hashsalt": "torchlamp", "lines.markersize": 4, "lines.linewidth": 1.2,
    }  # fmt: skip
    with rc_context(settings):
        canvas = Canvas(figsize=(7, 4.2), layout="constrained")
        figure.draw(canvas, figure.data)
        canvas.suptitle(figure.title, fontsize=10)
        # The layout is worked out once, not again for each file.
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")
        canvas.savefig(paths[1], metadata={"Date": None})
        canvas.savefig(paths[2], dpi=160)
    return paths


def _curves(axis: str, metric: str) -> Callable[[Any, pd.DataFrame], None]:
    def draw(canvas: Any, data: pd.DataFrame) -> None:
        rules = sorted((r for r in data["rule"].unique() if r not in ("none", "all")), key=order)
        rule_styles = styles(rules)
        with_curves = selecting(data)
        names = accumulators(with_curves) or ["?"]
        columns = min(3, len(names))
        lines = math.ceil(len(names) / columns)
        canvas.set_size_inches(3.6 * columns + 2.2, max(3.1 * lines + 0.5, 0.5 + 0.19 * len(rules)))
        panels = canvas.subplots(lines, columns, squeeze=False, sharey=True, sharex=True).flatten()
        for panel, name in zip(panels, names, strict=False):
            for rule in rules:
                curve = with_curves[(with_curves["accumulate"] == name) & (with_curves["rule"] == rule)]
                if len(curve):
                    _line(panel, curve.sort_values(axis), axis, metric, rule_styles[rule], legend_label(rule))
            _uniform(panel, data[data["rule"] == "none"], axis, metric)
            panel.set_title(name)
        plain = data.loc[data["rule"] == "none", axis] if axis != "rate" else []
        log_axis(panels[0].xaxis, [*with_curves[axis], *plain], percent=axis == "rate")
        log_axis(panels[0].yaxis, data[metric])
        for slot, panel in enumerate(panels):
            # The lowest panel of each column has the labels, also where the one below it is missing.
            panel.tick_params(labelbottom=slot + columns >= len(names))
        for panel in panels[len(names) :]:
            panel.remove()
        words = "recompute rate" if axis == "rate" else "operations / operations in float32"
        canvas.supxlabel(words, fontsize=9)
        canvas.supylabel(METRICS[metric], fontsize=9)
        _legend(canvas, panels[: len(names)])

    return draw


def _line(panel: Any, curve: pd.DataFrame, x: str, y: str, style: Style, label: str) -> None:
    errors = curve[f"{y}_se"].fillna(0) if f"{y}_se" in curve else None
    panel.errorbar(
        curve[x], curve[y], yerr=errors, color=style.light, marker=style.marker, linestyle=style.line,
        elinewidth=0.7, capsize=1.5, label=label,
    )  # fmt: skip


def _uniform(panel: Any, plain: pd.DataFrame, axis: str, metric: str) -> None:
    """Uniform precision: levels over a rate axis, points over a cost axis."""
    plain = plain[plain[metric] > 0].sort_values("mu")
    ink = styles(["none"])["none"].light
    if axis == "rate":
        for row in plain.itertuples():
            panel.axhline(getattr(row, metric), color=ink, linestyle=(0, (1, 3)), linewidth=0.8)
            panel.annotate(
                row.accumulate, (1, getattr(row, metric)), xycoords=("axes fraction", "data"), fontsize=7,
                ha="right", va="bottom", color="#555555",
            )  # fmt: skip
        return
    panel.plot(plain[axis], plain[metric], "d-", color=ink, linewidth=0.8, label="uniform precision")
    for row in plain.itertuples():
        at = (getattr(row, axis), getattr(row, metric))
        panel.annotate(
            row.accumulate, at, fontsize=7, color="#555555", xytext=(3, 3), textcoords="offset points"
        )


def _draw_mu(canvas: Any, data: pd.DataFrame) -> None:
    rates = sorted(rate for rate in data["rate"].unique() if 0 < rate < 1) or [0.01]
    rates = [rate for rate in rates if rate in (0.01, 0.04)] or rates[:1]
    canvas.set_size_inches(4 * len(rates) + 2.2, max(3.8, 0.5 + 0.19 * data["rule"].nunique()))
    panels = canvas.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    rules = sorted(data["rule"].unique(), key=order)
    rule_styles = styles(rules)
    for panel, rate in zip(panels, rates, strict=True):
        for rule in rules:
            curve = data[(data["rule"] == rule) & data["rate"].isin([0.0, rate, 1.0])].sort_values("mu")
            if len(curve):
                _line(panel, curve, "mu", "kl", rule_styles[rule], legend_label(rule))
        panel.set(title=f"{100 * rate:g} % recomputed", xlabel="mantissa bits")
        _whole_numbers(panel.xaxis)
    log_axis(panels[0].yaxis, data["kl"])
    panels[0].set_ylabel(METRICS["kl"])
    _legend(canvas, panels)


def _draw_heads(canvas: Any, data: pd.DataFrame) -> None:
    policies = list(data["policy"].unique())[:6]
    columns = min(3, len(policies))
    lines = math.ceil(len(policies) / columns)
    canvas.set_size_inches(3 * columns + 1, 0.5 + lines * max(2.2, 0.11 * data["layer"].nunique() + 1))
    panels = canvas.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    top = data["rate"].max()
    picture = None
    for panel, policy in zip(panels, policies, strict=False):
        table = data[data["policy"] == policy].pivot(index="layer", columns="head", values="rate")
        picture = panel.imshow(table.to_numpy(), cmap="cividis", vmin=0, vmax=top, aspect="auto")
        panel.set_title(policy)
        panel.grid(False)
        for axis in (panel.xaxis, panel.yaxis):
            _whole_numbers(axis)
    for panel in panels[len(policies) :]:
        panel.remove()
    canvas.supxlabel("head", fontsize=9)
    canvas.supylabel("layer", fontsize=9)
    canvas.colorbar(picture, ax=list(panels[: len(policies)]), label="recompute rate")


def _draw_positions(canvas: Any, data: pd.DataFrame) -> None:
    panel = canvas.subplots()
    data = data[data["accumulate"] == usual_accumulator(data)]
    rule_styles = styles(list(data["rule"].unique()))
    for (rule, policy, at), curve in data.groupby(["rule", "policy", "at"], sort=False):
        _line(panel, curve, "position", "rate", rule_styles[rule], f"{policy} ({100 * at:.3g} %)")
    log_axis(panel.yaxis, data["rate"], percent=True)
    equal = data["at"].nunique() == 1
    panel.set(xlabel="position of the query", ylabel="recompute rate")
    panel.set_title(
        f"at {100 * data['at'].iloc[0]:.3g} % over all positions" if equal else "each at its own rate"
    )
    _legend(canvas, [panel])


def _draw_layers(canvas: Any, data: pd.DataFrame) -> None:
    panel = canvas.subplots()
    rule_styles = styles(list(data["rule"].unique()))
    for (rule, line, label), curve in data.groupby(["rule", "line", "label"], sort=False):
        _line(panel, curve, "layer", "kl", numbered(rule_styles[rule], line), label)
    log_axis(panel.yaxis, data["kl"])
    _whole_numbers(panel.xaxis)
    panel.set(xlabel="the only narrow layer", ylabel=METRICS["kl"])
    _legend(canvas, [panel])


def _draw_sites(canvas: Any, data: pd.DataFrame) -> None:
    panel = canvas.subplots()
    names = list(data["site"].unique())
    for accumulate, style in accumulator_styles(accumulators(data)).items():
        part = data[data["accumulate"] == accumulate]
        slots = [names.index(site) for site in part["site"]]
        panel.errorbar(
            slots, part["kl"], yerr=part["kl_se"].fillna(0), fmt=style.marker, label=accumulate,
            color=style.light, capsize=1.5,
        )  # fmt: skip
    log_axis(panel.yaxis, data["kl"])
    panel.set(ylabel=METRICS["kl"], xlabel="the only narrow site")
    panel.set_xticks(range(len(names)), names)
    _legend(canvas, [panel])


def _draw_transforms(canvas: Any, data: pd.DataFrame) -> None:
    names = list(data["untransformed"].unique())
    canvas.set_size_inches(3.2 * len(names) + 2.6, 4.2)
    panels = canvas.subplots(1, len(names), squeeze=False, sharey=True)[0]
    rules = sorted(data["rule"].unique(), key=order)
    rule_styles = styles(rules)
    for panel, name in zip(panels, names, strict=True):
        part = data[data["untransformed"] == name]
        transforms = list(part["transform"].unique())
        for rule in rules:
            own = part[part["rule"] == rule]
            style = rule_styles[rule]
            panel.errorbar(
                own["transform"].map(transforms.index), own["kl"], yerr=own["kl_se"].fillna(0), fmt=style.marker,
                color=style.light, capsize=1.5, label=legend_label(rule),
            )  # fmt: skip
        panel.set_title(name)
        panel.set_xticks(range(len(transforms)), transforms, rotation=35, ha="right")
    log_axis(panels[0].yaxis, data["kl"])
    panels[0].set_ylabel(METRICS["kl"])
    canvas.supxlabel("transform; rules at their point nearest to 3 % recomputed", fontsize=9)
    _legend(canvas, panels)


def _whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers, and room for two of them where the data has one."""
    low, high = axis.get_data_interval()
    if high - low < 1 and getattr(axis.axes, "images", None) == []:
        axis.axes.set(**{f"{axis.axis_name}lim": (low - 1.2, high + 1.2)})
    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=2))


#: Kind of figure -> the function that draws its table.
_DRAW = {
    "transforms": _draw_transforms,
    "mu": _draw_mu,
    "heads": _draw_heads,
    "positions": _draw_positions,
    "layers": _draw_layers,
    "sites": _draw_sites,
}


def _legend(canvas: Any, panels: Any) -> None:
    """One legend for all panels, beside them."""
    found: dict[str, Any] = {}
    for panel in panels:
        found |= {name: handle for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    canvas.legend(found.values(), found.keys(), loc="outside right center", fontsize=8)


def _slug(*names: str) -> str:
    """Names as a part of a file name: of long ones, such as paths, the end, and what tells them apart."""
    return "-".join(_word(name) for name in names)


def _word(name: str) -> str:
    word = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.") or "x"
    if len(word) <= _MAX_WORD:
        return word
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{word[-(_MAX_WORD - 9) :].lstrip('_.')}_{digest}"
