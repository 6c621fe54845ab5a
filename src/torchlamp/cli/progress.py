"""The display of an evaluation's progress: a bar on a terminal, plain lines otherwise."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from torchlamp.evaluation.loop import Progress


@contextmanager
def reporter(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Give the callback for `evaluate`'s parameter `progress`; it writes to `console`."""
    if not console.is_terminal:
        yield lambda p: _print_line(console, p)
        return
    # Narrow enough that nothing is cut off on a terminal of 80 columns.
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn("windows"),
        TextColumn("{task.fields[kl]}"), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("evaluating", total=None, kl="", left="")

        def show(p: Progress) -> None:
            bar.update(
                task, total=p.total_windows, completed=p.windows,
                kl=_running_kl(p), left=f"{p.remaining:.0f} s left",
            )  # fmt: skip

        yield show


def _print_line(console: Console, p: Progress) -> None:
    """One line a window."""
    if p.passes % (p.total_passes // p.total_windows) == 0:
        times = f"{p.elapsed:.0f} s, about {p.remaining:.0f} s left"
        console.print(
            f"window {p.windows}/{p.total_windows}: {_running_kl(p)}; {times}",
            highlight=False,
            soft_wrap=True,
        )


def _running_kl(p: Progress) -> str:
    if not math.isfinite(p.kl_mean):
        return "KL not finite" if p.windows else ""
    error = f" ± {p.kl_standard_error:.0e}" if math.isfinite(p.kl_standard_error) else ""
    return f"KL {p.kl_mean:.2e}{error}"
