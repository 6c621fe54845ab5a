"""`torchlamp bench`: timings taken in turns, their medians, and the project's targets beside them.

Each benchmark times its contestants interleaved, so that a busy machine slows all of them alike, and quotes
ratios of medians. docs/performance.md explains what each target means and where its limit comes from.
"""

import json as json_module
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torchlamp.study.environment import environment, kernels
from torchlamp.study.output import check_writable, write_text

#: Benchmark -> the module whose `measure()` returns a `Bench`.
BENCHMARKS = {
    "scores": "torchlamp.study.bench_scores",
    "forward": "torchlamp.study.bench_forward",
    "evaluate": "torchlamp.study.bench_evaluate",
}


@dataclass(frozen=True)
class Timing:
    """One contestant: median, fastest and slowest seconds, and billions of rounded FMAs a second if it does any."""

    label: str
    median: float
    fastest: float
    slowest: float
    gfma: float | None = None


@dataclass(frozen=True)
class Target:
    """A figure with the limit that the project set itself."""

    label: str
    value: float
    limit: float
    #: True: at least `limit`; False: at most.
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure keeps its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Bench:
    """What a benchmark found."""

    title: str
    timings: list[Timing]
    targets: list[Target]


def run(name: str, json: Path | None = None) -> Bench:
    """Run a benchmark, print its table and targets, and write them as JSON if asked to.

    Raises
    ------
    ValueError
        An unknown name.
    OSError
        The JSON file can't be written.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}: allowed are {', '.join(BENCHMARKS)}")
    if json is not None:
        check_writable(json)
    found: Bench = import_module(BENCHMARKS[name]).measure()
    where = environment()
    _print(found, where)
    if json is not None:
        record = {
            "benchmark": name,
            "title": found.title,
            "timings": [asdict(t) for t in found.timings],
            "targets": [asdict(t) | {"met": t.met} for t in found.targets],
            "kernels": kernels(),
            "environment": where,
        }
        write_text(json, json_module.dumps(record, indent=2) + "\n")
    return found


def interleaved(
    calls: dict[str, Callable[[], object]], repeats: int, work: dict[str, float] | None = None
) -> list[Timing]:
    """Time every call `repeats` times, all of them in turns, after one turn that isn't counted.

    `work` gives the rounded FMAs of the calls that do any.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return [
        Timing(
            name,
            median := statistics.median(seconds),
            min(seconds),
            max(seconds),
            None if work is None or name not in work else work[name] / median / 1e9,
        )
        for name, seconds in times.items()
    ]


def ratio(timings: list[Timing], one: str, other: str) -> float:
    """Ratio of two contestants' medians."""
    median = {timing.label: timing.median for timing in timings}
    return median[one] / median[other]


def _print(found: Bench, where: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(emoji=False)
    table = Table(title=found.title, title_justify="left")
    for column in ("", "median ms", "fastest", "slowest", "G rounded FMA/s"):
        table.add_column(column, justify="right" if column else "left")
    for t in found.timings:
        cells = [f"{1e3 * s:.1f}" for s in (t.median, t.fastest, t.slowest)]
        table.add_row(t.label, *cells, "" if t.gfma is None else f"{t.gfma:.1f}")
    if found.timings:
        console.print(table)
    for target in found.targets:
        relation = "at least" if target.at_least else "at most"
        state = "met" if target.met else "MISSED"
        console.print(f"{target.label}: {target.value:.3g} ({relation} {target.limit:g}: {state})")
    console.print(f"{where['cpu']}, {where['threads']} threads, kernels: {kernels()['features']}")
