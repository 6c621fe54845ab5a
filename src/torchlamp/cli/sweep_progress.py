"""The display of a sweep's progress: a bar on a terminal, plain lines otherwise."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column

from torchlamp.sweep.folder import Outcome
from torchlamp.sweep.run import SweepProgress


@contextmanager
def sweep_reporter(console: Console) -> Iterator[Callable[[SweepProgress], None]]:
    """Give the callback for `sweep`'s parameter `progress`; it writes to `console`.

    Every point gets a line with its KL or its error. Below them a terminal shows a bar, the time left and the point
    being computed; elsewhere the time left stands at the end of each line.
    """

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield lambda p: say("; ".join(filter(None, (_line(p), left(p.remaining)))))
        return
    # The point is the last column: what doesn't fit into the terminal is cut off there.
    columns = (
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}", style="dim", markup=False, table_column=Column(no_wrap=True)),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, left="")

        def show(p: SweepProgress) -> None:
            if p.last is not None:
                say(_line(p))
            now = "" if p.current is None else str(p.current)
            bar.update(task, total=p.total, completed=p.done, description=now, left=left(p.remaining))

        yield show


def _line(p: SweepProgress) -> str:
    """One line about the point that has just ended, or, at the start, about the sweep."""
    if p.last is None:
        following = f"; next: {p.current}" if p.current else ""
        return f"{p.done} of {p.total} points are done{following}"
    failed = f", {p.failed} failed" if p.failed else ""
    outcome = f"FAILED: {p.last.error}" if p.last.error else f"{_figures(p.last)}, {p.last.seconds:.1f} s"
    return f"{p.done}/{p.total}{failed}: {p.last.point}: {outcome}"


def _figures(outcome: Outcome) -> str:
    if outcome.result is None:
        return "failed"
    kl, error, rate = (outcome.result[k] for k in ("kl_mean", "kl_standard_error", "recompute_rate"))
    shown = (
        f"KL {kl:.2e}" + (f" ± {error:.0e}" if math.isfinite(error) else "")
        if math.isfinite(kl)
        else "KL not finite"
    )
    return f"{shown}, {100 * rate:.2f} % recomputed"


def left(seconds: float | None) -> str:
    """A time to come in words: "about 3 h 20 min left"; nothing if it is unknown."""
    return "" if seconds is None else f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds as "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
