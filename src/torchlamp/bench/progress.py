"""How far a benchmark is: a line that changes on a terminal, a line now and then otherwise; on standard error."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

#: Seconds between two lines where standard error is no terminal.
_LINE_EVERY = 5.0


@contextmanager
def progress(name: str, console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Give the function that is told what runs, how many of its steps are done, and of how many."""
    console = Console(stderr=True, emoji=False) if console is None else console
    start = time.perf_counter()

    def line(what: str, done: int, total: int) -> str:
        said = what if what.startswith(name) else f"{name}: {what}"
        return f"{said}, {done} of {total}, {time.perf_counter() - start:.0f} s"

    if console.is_terminal:
        with console.status(f"{name} ...", refresh_per_second=2) as status:
            yield lambda what, done, total: status.update(line(what, done, total))
        return
    shown, last = -_LINE_EVERY, ""

    def say(what: str, done: int, total: int) -> None:
        nonlocal shown, last
        now = time.perf_counter()
        if what != last or now - shown >= _LINE_EVERY:
            console.print(line(what, done, total), highlight=False, markup=False, soft_wrap=True)
            shown, last = now, what

    yield say
