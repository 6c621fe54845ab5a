"""How far long work has come: what does the work says so here, and whoever draws progress listens.

Nobody listens unless the command line does, and then saying costs a function call.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """Where a piece of work stands."""

    #: The work in words, for example "packing layers".
    what: str
    done: int
    #: Parts that the work has; None: it can't be told.
    total: int | None
    #: No more will come of this work: it is done, or was broken off.
    ended: bool = False


_listener: ContextVar[Callable[[Step], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[Step], None]) -> Iterator[None]:
    """Within the block, in this thread, the listener is told of every step."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def work(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Work that takes time, in the block, which is given a function to call with the number of parts done."""
    listener = _listener.get()
    if listener is None:
        yield lambda done: None
        return
    state = Step(what, 0, total)

    def say(done: int) -> None:
        nonlocal state
        state = replace(state, done=done)
        listener(state)

    listener(state)
    try:
        yield say
    finally:
        listener(replace(state, ended=True))


def each(what: str, parts: Iterable[T]) -> Iterator[T]:
    """The parts one after the other, as the steps of one piece of work."""
    known = list(parts)
    with work(what, len(known)) as say:
        for done, part in enumerate(known):
            say(done)
            yield part
        say(len(known))
