"""The results of a sweep as one table: read, checked, one row a point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from torchlamp.evaluation.cost import GRANULARITIES, CostModel, Shape, costs
from torchlamp.policy.policy import Policy
from torchlamp.policy.precision import Precision
from torchlamp.policy.sites import SITES
from torchlamp.results.journal import read_lines
from torchlamp.results.read import read_result
from torchlamp.results.result import Result
from torchlamp.results.sweep_file import RESULTS, SCHEMA, last_of_each, record_problem
from torchlamp.rules.rule import Rule

#: `Result.sizes` of the packaged models, for results that are older than this figure.
OLDER_SIZES = {
    "smollm2-135m": {"head": 64, "hidden": 576, "mlp": 1536},
    "gemma3-270m": {"head": 256, "hidden": 640, "mlp": 2048},
}
#: GPT-2's, taken where neither a result nor `OLDER_SIZES` has them; the report says so.
ASSUMED_SIZES = {"head": 64, "hidden": 768, "mlp": 3072}

#: How a sweep names tokens that stand in their own order, as those of an evaluation do.
_REAL = "real"

#: Columns that say which experiment a point belongs to, and those that with them name the point.
GROUP = ["model", "text", "tokens"]
POINT = [*GROUP, "site", "layers", "accumulate", "policy"]


@dataclass
class ReportData:
    """Everything a report shows."""

    #: One row a finished point, seeds averaged; the columns are described in docs/report.md.
    points: pd.DataFrame
    #: Points that failed: model, text, tokens, policy, error.
    failed: list[dict[str, str]] = field(default_factory=list)
    #: Caveats of the figures, a sentence each.
    notes: list[str] = field(default_factory=list)
    #: The different environments that the points were computed in.
    environments: list[dict[str, Any]] = field(default_factory=list)
    #: State of the code ("git" of an environment) -> the dates of the points that it computed.
    states: dict[str, list[str]] = field(default_factory=dict)


def read_report_data(folders: Sequence[Path]) -> ReportData:
    """Read the results.jsonl of every folder; a file is taken for a result of ``torchlamp evaluate --json``.

    Raises
    ------
    OSError
        A folder without results, or one that can't be read.
    ValueError
        No finished point; a line that is no result, or of another schema; points measured with different windows,
        window lengths or tokens, which can't share a figure.
    """
    notes: list[str] = []
    # Of a point that is in several folders, the last one's record counts.
    records = last_of_each(
        record
        for folder in folders
        for record in (_read_file(folder) if folder.is_file() else _read(folder, notes))
    )
    rows: list[dict[str, Any]] = []
    unsized: set[str] = set()
    data = ReportData(pd.DataFrame(), notes=notes)
    for record in records.values():
        point = record["point"]
        if record["status"] != "done":
            named = {name: str(point.get(name, "")) for name in (*GROUP, "policy")}
            data.failed.append(named | {"error": str(record.get("error") or "unknown error")})
            continue
        result = Result.from_dict(record["result"])
        if result.partial:
            notes.append(
                f"{result.policy} on {point['text']}: interrupted after {result.windows} windows, left out."
            )
            continue
        own = {
            "model": point["model"],
            "text": point["text"],
            "tokens": point["tokens"],
            "layers": _layers(point),
        }
        rows.append(own | _row(result))
        rows += [own | _row(other) for other in result.comparisons if other.role != "reference"]
        if not ASSUMED_SIZES.keys() <= _known_sizes(result).keys():
            unsized.add(result.model)
        state = str(result.environment.get("git") or "unknown")
        data.states.setdefault(state, []).append(str(result.environment.get("date", "")))
        if result.environment not in data.environments:
            data.environments.append(result.environment)
    if not rows:
        where = ", ".join(str(folder) for folder in folders)
        what = f"all {len(data.failed)} points failed" if data.failed else "no finished point"
        raise ValueError(f"{where!r} has nothing to report: {what}; run torchlamp sweep first")
    table = pd.DataFrame(rows)
    _check_settings(table)
    data.points = _average_seeds(table)
    if unsized:
        notes.append(
            f"Costs of {', '.join(sorted(unsized))} assume sums of K = {ASSUMED_SIZES['head']} terms "
            "(see docs/report.md)."
        )
    return data


def _read(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of a folder's results; a torn last line is noted."""
    path = folder / RESULTS
    try:
        lines = read_lines(path, SCHEMA)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no results in {str(folder)!r}: there is no file {RESULTS}; give the --output folder of torchlamp sweep"
        ) from None
    if lines.torn:
        notes.append(f"The last line of {path} is torn and was left out.")
    for number, record in enumerate(lines.records, start=1):
        if (reason := record_problem(record)) is not None:
            raise ValueError(f"line {number} of {str(path)!r} {reason}: it is no point of a sweep")
    return lines.records


def _read_file(path: Path) -> list[dict[str, Any]]:
    """An evaluation's result as the record of a point of its own."""
    result = read_result(path)
    point = {"model": result.model, "text": result.text, "tokens": _REAL, "policy": result.policy}
    key = f"{path}: {result.tokens_sha256} {result.policy} {result.seed}"
    return [{"key": key, "point": point, "status": "done", "result": result.to_dict()}]


def _layers(point: dict[str, Any]) -> str:
    """The numbers of the layers that ran under the policy, or "all". ValueError for anything else."""
    layers = point.get("layers")
    if layers is None:
        return "all"
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"a point's layers are {layers!r}: a list of layer numbers is expected, or null")
    return ", ".join(map(str, layers))


def _row(result: Result) -> dict[str, Any]:
    policy = Policy.parse(result.policy)
    parts = list(policy.sites.values())
    precisions = {str(part.precision): part.precision for part in parts}
    one = next(iter(precisions.values())) if len(precisions) == 1 else None
    rules = {str(part.rule): part.rule for part in parts}
    rule = next(iter(rules.values()))
    value = getattr(rule, "value", None)
    return {
        "site": " + ".join(policy.sites),
        "accumulate": " / ".join(precisions),
        "transform": " / ".join(dict.fromkeys(transform_label(part.precision) for part in parts)),
        "untransformed": " / ".join(dict.fromkeys(str(part.precision.with_transforms(())) for part in parts)),
        "mu": math.nan if one is None or one.is_stored else one.sums.format.grid.mantissa_bits,
        "policy": result.policy,
        "rule": " / ".join(dict.fromkeys(rule_label(part.rule) for part in parts)),
        "threshold": float(value) if value is not None and len(rules) == 1 else math.nan,
        "realisable": all(part.rule.role != "oracle" for part in parts),
        "windows": result.windows,
        "window_length": result.window_length,
        "seed": result.seed,
        "tokens_sha256": result.tokens_sha256,
        "kl": result.kl_mean,
        "kl_se": result.kl_standard_error,
        "kl_99": result.kl_percentiles["99"],
        "flip": result.flip_rate,
        "flip_se": result.flip_standard_error,
        "perplexity": result.perplexity,
        "reference_perplexity": result.reference_perplexity,
        "log_ratio": result.log_perplexity_ratio,
        "log_ratio_se": result.log_perplexity_ratio_standard_error,
        "rms_delta_p": result.rms_delta_p,
        "rate": result.recompute_rate,
        "rows_touched": result.rows_touched,
        "by_layer": result.recompute_rate_by_layer,
        "by_head": result.recompute_rate_by_head,
        "by_position": result.recompute_rate_by_position,
        "kl_by_window": result.kl_by_window,
        "flip_by_window": result.flip_by_window,
        **_costs(result, policy),
    }


def rule_label(rule: Rule) -> str:
    """The rule's name, which is that of its curve; a control that copies a rule's counts carries its name."""
    followed = getattr(rule, "rule", None)
    return f"{rule.name} {followed.name}" if isinstance(followed, Rule) else rule.name


def transform_label(precision: Precision) -> str:
    """The transforms of a precision as they are spelt after it ("center.sort"), or "none"."""
    return ".".join(map(str, precision.transforms)) or "none"


def _known_sizes(result: Result) -> dict[str, int]:
    """The sizes of a result's model: those that it holds, or of an older one those of the packaged model."""
    return result.sizes or OLDER_SIZES.get(result.model, {})


def _costs(result: Result, policy: Policy) -> dict[str, Any]:
    """Relative operations, with the look-ahead's sums in float32 (as simulated) and, `_narrow`, in the accumulator."""
    names = [f"cost_{name}{end}" for name in GRANULARITIES for end in ("", "_narrow")]
    found: dict[str, Any] = dict.fromkeys(names, math.nan) | {"cost_estimated": True}
    if len(policy.sites) > 1:
        return found
    ((site, part),) = policy.sites.items()
    sizes = ASSUMED_SIZES | _known_sizes(result)
    length = result.window_length
    # Results that are older than a size have the hidden states' in its place.
    depth = ({"window": length} | sizes).get(SITES[site].length, sizes["hidden"])
    shape = Shape(length, length, depth, causal=site == "scores")
    for end, model in (("", CostModel()), ("_narrow", CostModel(error=None, distance=None))):
        by_name = costs(
            shape,
            part.accumulate,
            part.rule,
            result.recompute_rate,
            result.block_rates,
            model,
            transforms=part.precision.transforms,
            calibrated=result.calibration is not None,
        )
        for name, cost in by_name.items():
            found[f"cost_{name}{end}"] = cost.total
            found["cost_estimated"] = cost.estimated
    return found


def _check_settings(table: pd.DataFrame) -> None:
    """One report compares points; it refuses points that weren't measured alike."""
    # Figures and tables are a model's: models may be measured on different numbers of windows.
    for (_, whole), part in table.groupby(["model", table["layers"] == "all"]):
        sizes = part[["windows", "window_length"]].drop_duplicates()
        if len(sizes) > 1:
            listed = " and ".join(
                f"{row.windows} window{'' if row.windows == 1 else 's'} of {row.window_length}"
                for row in sizes.itertuples()
            )
            example = part.groupby(["windows", "window_length"])["model"].first()
            what = "points" if whole else "points of single layers"
            raise ValueError(
                f"{what} measured with {listed} tokens (models {', '.join(dict.fromkeys(example))}) can't share a "
                "figure: give torchlamp report folders with one setting"
            )
    for (model, text, tokens, length), part in table.groupby([*GROUP, "window_length"]):
        whole_model = part[part["layers"] == "all"]
        if whole_model["tokens_sha256"].nunique() > 1 and tokens == "real":
            raise ValueError(
                f"{model!r} on {text!r} was measured on different tokens (windows of {length}) under one name: the "
                "text or the tokenizer changed between sweeps; give torchlamp report folders with one of them"
            )


def _average_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """One row a point: the mean over seeds of the figures, and the larger of the error of windows and of seeds."""
    distinct = table.drop_duplicates([*POINT, "seed"], keep="last")
    count = distinct.groupby(POINT)["seed"].transform("size")
    points = distinct[count == 1].assign(seeds=1)
    rows = []
    for _, same in distinct[count > 1].groupby(POINT, sort=False):
        row = same.iloc[-1].copy()
        for name in same.select_dtypes("number").columns.drop(["seed", "windows", "window_length", "mu"]):
            row[name] = same[name].mean()
        for name in ("kl", "flip"):
            spread = float(same[name].std()) / math.sqrt(len(same))
            row[f"{name}_se"] = max(float(row[f"{name}_se"]), spread)
            row[f"{name}_by_window"] = _mean_of_lists(list(same[f"{name}_by_window"]))
        row["seeds"] = len(same)
        rows.append(row)
    if rows:
        points = pd.concat([points, pd.DataFrame(rows)]).infer_objects()
    return points.drop(columns=["seed", "tokens_sha256"]).reset_index(drop=True)


def _mean_of_lists(lists: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*lists, strict=False)]
