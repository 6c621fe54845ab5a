"""How a sweep's progress is shown: a bar on a terminal, plain lines otherwise."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from torchlamp.study.sweep import SweepProgress
from torchlamp.study.sweep_folder import Outcome


@contextmanager
def sweep_reporter(console: Console) -> Iterator[Callable[[SweepProgress], None]]:
    """Give the callback for `sweep`'s parameter `progress`; it writes to `console`.

    Failed points are always named in a line of their own.
    """
    if not console.is_terminal:
        yield lambda p: _print_line(console, p)
        return
    columns = (
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("points", total=None, left="")

        def show(p: SweepProgress) -> None:
            failed = f"{p.failed} failed, " if p.failed else ""
            description = f"points, {failed}last {_figures(p.last)}" if p.last else "points"
            bar.update(task, total=p.total, completed=p.done, description=description, left=left(p.remaining))
            if p.last is not None and p.last.error is not None:
                bar.print(_failure(p.last), highlight=False, markup=False, soft_wrap=True)
            if p.current is not None:
                bar.print(f"computing {p.current}", highlight=False, markup=False, style="dim")

        yield show


def _print_line(console: Console, p: SweepProgress) -> None:
    """One line a point."""
    failed = f", {p.failed} failed" if p.failed else ""
    if p.last is None:
        line = f"{p.done} of {p.total} points are done; next: {p.current}" if p.current else ""
    elif p.last.error is not None:
        line = f"{p.done}/{p.total}{failed}: {_failure(p.last)}"
    else:
        line = f"{p.done}/{p.total}{failed}: {p.last.point}: {_figures(p.last)}, {p.last.seconds:.1f} s"
    if line:
        ahead = left(p.remaining)
        console.print(line + (f"; {ahead}" if ahead else ""), highlight=False, markup=False, soft_wrap=True)


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


def _failure(outcome: Outcome) -> str:
    return f"FAILED {outcome.point}: {outcome.error}"


def left(seconds: float | None) -> str:
    """A time to come in words: "about 3 h 20 min left"; nothing if it is unknown."""
    return "" if seconds is None else f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds as "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
