"""`torchlamp bench`: timings taken in turns, their medians, and the project's targets beside them.

Each benchmark times its contestants interleaved, so that a busy machine slows all of them alike, and quotes
ratios of medians. docs/performance.md explains what each target means and where its limit comes from.
"""

import json as json_module
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torchlamp.evaluation.environment import environment, kernels
from torchlamp.results.output import check_writable, write_text

#: Benchmark -> the module whose `measure()` returns a `Bench`, or several.
BENCHMARKS = {
    "scores": "torchlamp.bench.scores",
    "forward": "torchlamp.bench.forward",
    "evaluate": "torchlamp.bench.evaluate",
    "attention": "torchlamp.bench.attention",
    "decode": "torchlamp.bench.decode",
    "soak": "torchlamp.bench.soak",
}


@dataclass(frozen=True)
class Timing:
    """One contestant: median, fastest and slowest seconds, and what else the benchmark measures of it."""

    label: str
    median: float
    fastest: float
    slowest: float
    #: Billions of rounded FMAs a second.
    gfma: float | None = None
    #: Tokens a second.
    per_second: float | None = None
    #: Mean KL to the reference per token, nats, and its standard error over tokens.
    kl: float | None = None
    kl_error: float | None = None
    #: Relative error of the output.
    error: float | None = None
    #: Anything else, for people.
    note: str = ""


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
    """The timings of a benchmark, and its figures beside their targets."""

    title: str
    timings: list[Timing]
    targets: list[Target]


def run(name: str, json: Path | None = None) -> list[Bench]:
    """Run a benchmark, print its tables and targets, and write them as JSON if asked to.

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
    measured: Bench | Iterable[Bench] = import_module(BENCHMARKS[name]).measure()
    where = environment()
    found = []
    # A benchmark of many parts hands over each as it is done: what is printed and written can't be lost any more.
    for bench in [measured] if isinstance(measured, Bench) else measured:
        found.append(bench)
        _print(bench)
        if json is not None:
            write_text(json, json_module.dumps(_record(name, found, where), indent=2) + "\n")
    print(f"{where['cpu']}, {where['threads']} threads, kernels: {kernels()['features']}")
    return found


def _record(name: str, found: list[Bench], where: dict[str, Any]) -> dict[str, Any]:
    parts = [
        {
            "title": bench.title,
            "timings": [asdict(t) for t in bench.timings],
            "targets": [asdict(t) | {"met": t.met} for t in bench.targets],
        }
        for bench in found
    ]
    # One part stands at the top level, as it did before there were several.
    inner = parts[0] if len(parts) == 1 else {"parts": parts}
    return {"benchmark": name, **inner, "kernels": kernels(), "environment": where}


def interleaved(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    work: dict[str, float] | None = None,
    pause: float = 0.0,
) -> list[Timing]:
    """Time every call `repeats` times, all of them in turns, after one turn that isn't counted.

    `work` gives the rounded FMAs of the calls that do any. `pause` seconds pass before each call, in which threads that
    another one left spinning go to sleep; then the call is made once untimed, so that its own are awake.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            if pause:
                time.sleep(pause)
                call()
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


#: Attribute of a `Timing` -> its column and how it is printed; columns that nothing fills are left out.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "gfma": ("G rounded FMA/s", "{:.1f}".format),
    "per_second": ("tokens/s", "{:.1f}".format),
    "error": ("error", "{:.1e}".format),
    "kl": ("KL", "{:.1e}".format),
    "kl_error": ("±", "{:.0e}".format),
    "note": ("", str),
}


def _print(found: Bench) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    columns = {
        name: column for name, column in _COLUMNS.items() if any(getattr(t, name) for t in found.timings)
    }
    table = Table(title=found.title, title_justify="left")
    for column in ("", "median ms", "fastest", "slowest", *(title for title, _ in columns.values())):
        table.add_column(column, justify="right" if column else "left")
    for t in found.timings:
        cells = [f"{1e3 * s:.3g}" if s < 0.1 else f"{1e3 * s:.1f}" for s in (t.median, t.fastest, t.slowest)]
        extra = [
            "" if (value := getattr(t, name)) is None else show(value) for name, (_, show) in columns.items()
        ]
        table.add_row(t.label, *cells, *extra)
    if found.timings:
        console.print(table)
    for target in found.targets:
        relation = "at least" if target.at_least else "at most"
        state = "met" if target.met else "MISSED"
        console.print(f"{target.label}: {target.value:.3g} ({relation} {target.limit:g}: {state})")
