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
from torchlamp.evaluation.cost import GRANULARITIES
from torchlamp.report.data import Study, read_study
from torchlamp.report.figures import figures, save
from torchlamp.report.page import pack, render
from torchlamp.report.style import order, styles
from torchlamp.report.tables import equal_rate, summary
from torchlamp.results.output import check_writable, write_text

#: What the page needs of a point.
_POINT = [
    *("model", "text", "tokens", "site", "layers", "accumulate", "mu", "policy", "rule", "realisable"),
    *("kl", "kl_se", "kl_99", "flip", "flip_se", "rate", "rms_delta_p"),
    *("perplexity", "reference_perplexity", "log_ratio_se", "by_head", "by_position", "cost_estimated"),
    *(f"cost_{name}{end}" for name in GRANULARITIES for end in ("", "_narrow")),
]


def report(folders: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Write report.html and the folder figures/ into `output`, by default the first folder.

    Everything is computed before anything is written: an error leaves an older report as it is. Files of an older
    report that this one doesn't have stay in figures/.

    Returns
    -------
    list of Path
        What was written, the page first.

    Raises
    ------
    OSError, ValueError
        As `read_study`; or the output can't be written.
    """
    study = read_study(folders)
    target = folders[0] if output is None else output
    target.mkdir(parents=True, exist_ok=True)
    page = target / "report.html"
    check_writable(page)
    html = report_page(study, [str(folder) for folder in folders])
    temporary = Path(tempfile.mkdtemp(prefix=".figures.", dir=target))
    try:
        names: set[str] = set()
        for figure in figures(study):
            if figure.name in names:
                raise ValueError(f"two figures would be {figure.name!r}: rename one of the texts or models")
            names.add(figure.name)
            save(figure, temporary)
        summary(study.points).to_csv(temporary / "points.csv", index=False)
        equal_rate(study.points).to_csv(temporary / "equal-rate.csv", index=False)
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


def report_page(study: Study, folders: Sequence[str]) -> str:
    """The page as HTML."""
    points = study.points
    labels = sorted({*points["rule"], "none", "all"}, key=order)
    shown = points[_POINT].assign(by_head=points["by_head"].map(pack_rates))
    data = {
        "points": _records(shown.to_dict("records")),
        "rates": _records(equal_rate(points).to_dict("records")),
        "rules": labels,
        "styles": {label: style.to_dict() for label, style in styles(labels).items()},
    }
    whole = points[points["layers"] == "all"]
    sizes = (whole if len(whole) else points)[["windows", "window_length"]].drop_duplicates()
    settings = " and ".join(
        f"{row.windows} windows of {row.window_length} tokens" for row in sizes.itertuples()
    )
    return render(
        "report",
        data,
        models=", ".join(points["model"].unique()),
        texts=", ".join(points["text"].unique()),
        count=len(points),
        settings=settings,
        seeds=bool((points["seeds"] > 1).any()),
        failed=study.failed,
        notes=study.notes,
        environments=[_shared(study.environments)],
        folders=", ".join(folders),
        version=torchlamp.__version__,
    )


def pack_rates(by_head: list[list[float]]) -> dict[str, Any] | None:
    """Rates of layers x heads in steps of 1 / 65535; layers that ran in float32 have no rates and are zero."""
    heads = max((len(rates) for rates in by_head), default=0)
    if not heads:
        return None
    table = np.zeros((len(by_head), heads), dtype="<u2")
    for layer, rates in enumerate(by_head):
        table[layer, : len(rates)] = np.rint(65535 * np.asarray(rates))
    return {"layers": len(by_head), "heads": heads, "rates": pack(table)}


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
