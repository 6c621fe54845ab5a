"""Bars for work that takes more than a second: loading, converting, packing, inspecting."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from torchlamp.cli.verbosity import error_console
from torchlamp.steps import Step, listening

#: Seconds before a bar is drawn: what is done by then would only flicker.
_DELAY = 1.0


@contextmanager
def shown_steps(console: Console | None = None) -> Iterator[None]:
    """Within the block long work has a bar on standard error; none with ``--quiet``, or where that is no terminal."""
    console = error_console() if console is None else console
    if console.quiet or not console.is_terminal:
        yield
        return
    bars = _Bars(console)
    try:
        with listening(bars.show):
            yield
    finally:
        bars.stop()


class _Bars:
    """The bar of the innermost work under way, drawn once it has taken `_DELAY`, gone when that ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # A bar is started by the timer's thread.
        self._lock = threading.Lock()
        self._running: list[Step] = []
        self._timer: threading.Timer | None = None
        self._bar: Progress | None = None

    def show(self, step: Step) -> None:
        """Take note of a step."""
        with self._lock:
            same = bool(self._running) and self._running[-1].what == step.what
            if step.ended:
                self._running = [other for other in self._running if other.what != step.what]
                if not self._running:
                    self._clear()
            elif same:
                self._running[-1] = step
            else:
                self._running.append(step)
                if self._timer is None:
                    self._timer = threading.Timer(_DELAY, self._start)
                    self._timer.daemon = True
                    self._timer.start()
            self._draw()

    def stop(self) -> None:
        """Take away what is drawn."""
        with self._lock:
            self._running = []
            self._clear()

    def _start(self) -> None:
        with self._lock:
            if not self._running or self._bar is not None:
                return
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("")
            self._bar.start()
            self._draw()

    def _draw(self) -> None:
        if self._bar is not None and self._running:
            step = self._running[-1]
            task = self._bar.task_ids[0]
            self._bar.update(task, description=step.what, completed=step.done, total=step.total)

    def _clear(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
