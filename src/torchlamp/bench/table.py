"""The tables of benchmarks, for people."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from torchlamp.bench.turns import Bench, Target, Timing

#: Columns where standard output is no terminal.
_WIDTH = 160
#: Attribute of a `Timing` -> its column and how it is printed; columns that nothing fills are left out.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "gfma": ("G rounded FMA/s", "{:.1f}".format),
    "per_second": ("tokens/s", "{:.1f}".format),
    "error": ("error", "{:.1e}".format),
    "kl": ("KL", "{:.1e}".format),
    "kl_error": ("±", "{:.0e}".format),
    "note": ("", str),
}


def print_bench(found: Bench, *, partial: bool = False) -> None:
    """Print the timings of a benchmark, and its figures beside their targets."""
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    if found.timings:
        console.print(timings_table(found, partial))
    for label, reason in found.absent.items():
        console.print(f"{label}: {reason}", markup=False, highlight=False)
    for target in found.targets:
        console.print(target_line(target), markup=False)


def timings_table(found: Bench, partial: bool = False) -> Table:
    """One row a contestant; fastest and slowest only where something was timed more than once."""
    columns = {
        name: column for name, column in _COLUMNS.items() if any(getattr(t, name) for t in found.timings)
    }
    once = all(t.fastest == t.slowest for t in found.timings)
    times = ("ms",) if once else ("median ms", "fastest", "slowest")
    title = f"PARTIAL (stopped): {found.title}" if partial else found.title
    table = Table(title=title, title_justify="left")
    own = list(dict.fromkeys(name for t in found.timings for name in t.figures))
    for column in (
        "",
        *times,
        *(title for title, _ in columns.values()),
        *(n.replace("_", " ") for n in own),
    ):
        table.add_column(column, justify="right" if column else "left")
    for t in found.timings:
        extra = [
            "" if (value := getattr(t, name)) is None else show(value) for name, (_, show) in columns.items()
        ]
        extra += [f"{t.figures[name]:.4g}" if name in t.figures else "" for name in own]
        table.add_row(t.label, *_times(t)[: len(times)], *extra)
    return table


def _times(timing: Timing) -> list[str]:
    seconds = (timing.median, timing.fastest, timing.slowest)
    return [f"{1e3 * s:.3g}" if s < 0.1 else f"{1e3 * s:.1f}" for s in seconds]


def target_line(target: Target) -> str:
    """A figure beside its limit, in as many digits as tell the two apart."""
    relation = "at least" if target.at_least else "at most"
    limit = f"{target.limit:g}"
    digits = 3
    while digits < 17 and not target.met and float(f"{target.value:.{digits}g}") == target.limit:
        digits += 1
    shown = f"{target.value:.{digits}g}"
    state = "not judged" if not target.judged else "met" if target.met else "MISSED"
    return f"{target.label}: {shown} ({relation} {limit}: {state})"
