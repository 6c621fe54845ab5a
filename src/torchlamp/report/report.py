"""`torchlamp report`: the results of sweeps as one page that works offline, and as figures with their data."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import torchlamp
from torchlamp.report.data import GROUP, ReportData, read_report_data
from torchlamp.report.figures import figures, file_names, save
from torchlamp.report.figures_data import (
    AXES,
    METRICS,
    FigureData,
    accumulators,
    figures_data,
    selecting,
    usual_accumulator,
)
from torchlamp.report.page import pack, render
from torchlamp.report.style import BASE, STYLES, accumulator_styles, legend_label, numbered, order, styles
from torchlamp.report.tables import equal_rate, summary
from torchlamp.results.output import check_writable, write_text
from torchlamp.steps import each, work


def report(folders: Sequence[Path], output: Path | None = None, title: str | None = None) -> list[Path]:
    """Write report.html and the folder figures/ into `output`, by default the first folder or the first file's.

    Everything is computed before anything is written: an error leaves an older report as it is. Files of an older
    report that this one doesn't have stay in figures/. `title` is the page's heading.

    Returns
    -------
    list of Path
        The files, the page first.

    Raises
    ------
    OSError, ValueError
        As `read_report_data`; or the output can't be written.
    """
    first = folders[0].parent if folders[0].is_file() else folders[0]
    target = first if output is None else output
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"can't write a report into {str(target)!r}: it is a file, give a folder")
    data = read_report_data(folders)
    target.mkdir(parents=True, exist_ok=True)
    page = target / "report.html"
    check_writable(page)
    with work("making the page"):
        html = report_page(data, [str(folder) for folder in folders], title)
    temporary = Path(tempfile.mkdtemp(prefix=".figures.", dir=target))
    try:
        names: set[str] = set()
        # They are drawn as they are saved.
        for figure in each("drawing figures", figures(figures_data(data))):
            if figure.name in names:
                raise ValueError(f"two figures would be {figure.name!r}: rename one of the texts or models")
            names.add(figure.name)
            save(figure, temporary)
        summary(data.points).to_csv(temporary / "points.csv", index=False)
        equal_rate(data.points).to_csv(temporary / "equal-rate.csv", index=False)
        home = target / "figures"
        home.mkdir(exist_ok=True)
        written = []
        for file in sorted(temporary.iterdir()):
            os.replace(file, home / file.name)
            written.append(home / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_text(page, html)
    return [page, *written]


#: The page's heading unless another is given.
TITLE = "How narrow may an accumulator be?"


def report_page(data: ReportData, folders: Sequence[str], title: str | None = None) -> str:
    """The page as HTML."""
    points = data.points
    whole = points[points["layers"] == "all"]
    sizes = (whole if len(whole) else points)[["windows", "window_length"]].drop_duplicates()
    settings = " and ".join(
        f"{row.windows} window{'' if row.windows == 1 else 's'} of {row.window_length} tokens"
        for row in sizes.itertuples()
    )
    return render(
        "report",
        page_data(data),
        models=", ".join(points["model"].unique()),
        texts=", ".join(points["text"].unique()),
        count=len(points),
        settings=settings,
        seeds=bool((points["seeds"] > 1).any()),
        failed=data.failed,
        notes=data.notes,
        title=title or TITLE,
        environments=[_shared([{k: v for k, v in e.items() if k != "git"} for e in data.environments])],
        states=code_states(data.states),
        folders=", ".join(folders),
        version=torchlamp.__version__,
    )


def page_data(data: ReportData) -> dict[str, Any]:
    """Everything that the page's script draws, ready for JSON: the tables of the files, and their styles."""
    points = data.points
    labels = sorted({*points["rule"], "none", "all"}, key=order)
    return {
        "points": _records(summary(points).to_dict("records")),
        "rates": _records(equal_rate(points).to_dict("records")),
        "figures": [_figure(found) for found in figures_data(data)],
        "rules": labels,
        "precisions": {
            row.accumulate: [row.untransformed, row.transform]
            for row in points[["accumulate", "untransformed", "transform"]].drop_duplicates().itertuples()
        },
        "accumulators": accumulators(points),
        "styles": {
            label: style.to_dict() | {"label": legend_label(label)} for label, style in styles(labels).items()
        },
        "metrics": METRICS,
        "axes": AXES,
        "base": BASE,
    }


def _figure(found: FigureData) -> dict[str, Any]:
    """A figure's table for the script, with the styles of lines and markers that aren't those of rules."""
    table = found.table
    own: dict[str, Any] = {}
    if found.kind == "curves":
        chosen = selecting(table)
        own["usual"] = usual_accumulator(chosen if len(chosen) else table)
    elif found.kind == "heads":
        table = table.assign(by_head=table["by_head"].map(pack_rates))
    elif found.kind == "layers":
        lines = range(int(table["line"].max()) + 1)
        own["lines"] = [numbered(STYLES["none"], line).to_dict() for line in lines]
    elif found.kind == "sites":
        styled = accumulator_styles(accumulators(table))
        own["styles"] = {name: style.to_dict() for name, style in styled.items()}
    group = dict(zip(GROUP, found.group, strict=True))
    rows = _records(table.to_dict("records"))
    own["files"] = file_names(found)
    return {"kind": found.kind, **group, "site": found.site, **own, "rows": rows}


def pack_rates(by_head: list[list[float]]) -> dict[str, Any] | None:
    """Rates of layers x heads in steps of 1 / 65535; layers that ran in float32 have no rates and are zero."""
    heads = max((len(rates) for rates in by_head), default=0)
    if not heads:
        return None
    table = np.zeros((len(by_head), heads), dtype="<u2")
    for layer, rates in enumerate(by_head):
        table[layer, : len(rates)] = np.rint(65535 * np.asarray(rates))
    return {"layers": len(by_head), "heads": heads, "rates": pack(table)}


def code_states(states: dict[str, list[str]]) -> list[dict[str, str]]:
    """One row a commit, by date: its points, the first and last date, and how many had uncommitted changes ("+")."""
    commits: dict[str, list[tuple[str, bool]]] = {}
    for state, dates in states.items():
        commits.setdefault(state.removesuffix("+"), []).extend((date, state.endswith("+")) for date in dates)
    rows = []
    for commit, points in sorted(commits.items(), key=lambda item: min(date for date, _ in item[1])):
        dates = sorted(date for date, _ in points if date)
        changed = sum(dirty for _, dirty in points)
        rows.append(
            {
                "commit": commit,
                "points": f"{len(points)}" + (f", {changed} with uncommitted changes" if changed else ""),
                "dates": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "unknown",
            }
        )
    return rows


def _shared(environments: list[dict[str, Any]]) -> dict[str, str]:
    """One environment: where the points' environments differ, the values side by side, dates as first and last."""
    names = dict.fromkeys(name for environment in environments for name in environment)
    found = {}
    for name in names:
        values = list(dict.fromkeys(_words(e[name]) for e in environments if name in e))
        found[name] = (
            f"{min(values)} to {max(values)}" if name == "date" and len(values) > 1 else "; ".join(values)
        )
    return found


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _records(records: list[dict[str, Any]]) -> Any:
    """JSON's values: what is not finite becomes null, figures keep six digits."""
    return json.loads(json.dumps(_clean(records)))


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
