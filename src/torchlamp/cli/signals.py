"""Signals that end a command: Ctrl-C and SIGTERM stop its work, and what is finished by then is kept."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
#: Seconds after a signal in which more of them are taken for the same wish: two quick Ctrl-C, or a Ctrl-C that a
#: terminal and a shell both send.
_SAME_WISH = 5.0


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever a KeyboardInterrupt would tidy up and keep is tidied up and kept."""


class Signals:
    """What the command of this process has received."""

    def __init__(self) -> None:
        #: Number of the first signal; None: none came.
        self.received: int | None = None
        self._at = -_SAME_WISH
        self._held = False

    def hold(self) -> None:
        """From now on signals only count."""
        self._held = True

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Raise at the first signal, and at later ones that come long after the last raised one."""
        now = time.monotonic()
        self.received = self.received or number
        if self._held or now - self._at < _SAME_WISH:
            return
        self._at = now
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


#: Of the command that runs; replaced by each.
_current = Signals()
#: Whether the process ends with its command.
_process_ends = False


def process_ends_with_command() -> None:
    """Say so once: signals that come after one that ended the command then don't disturb the end of the process."""
    global _process_ends
    _process_ends = True


def exit_code() -> int:
    """130 after Ctrl-C, 143 after SIGTERM, as shells have them."""
    return TERMINATED if terminated() else INTERRUPTED


def terminated() -> bool:
    """Whether the command was sent SIGTERM."""
    return _current.received == signal.SIGTERM


def word() -> str:
    """What happened, for a message."""
    return "terminated" if terminated() else "interrupted"


def hold_signals() -> None:
    """From now on signals only count: everything is computed, and its writing must not be torn."""
    _current.hold()


@contextmanager
def signals_of_command() -> Iterator[None]:
    """Within the block the first Ctrl-C raises KeyboardInterrupt and the first SIGTERM `Terminated`.

    More of them in the next seconds do nothing, so that what the first one stopped can be written down. Outside the
    main thread, where Python takes no signals, nothing changes.
    """
    global _current
    before, _current = _current, Signals()
    mine = _current
    numbers = (signal.SIGINT, signal.SIGTERM)
    restore = _handle(mine.stop, numbers)
    try:
        yield
    finally:
        if _process_ends and mine.received is not None:
            # Python gives its own handlers up before its end, and would die of a late Ctrl-C.
            _handle(signal.SIG_IGN, numbers)
        else:
            restore()
            _current = before


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C only makes the yielded function true; a second one raises KeyboardInterrupt."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    restore = _handle(ask, (signal.SIGINT,))
    try:
        yield asked.is_set
    finally:
        restore()


def _handle(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers, numbers: tuple[signal.Signals, ...]
) -> Callable[[], None]:
    """Have a function called at these signals; returns the way back. What a shell or nohup ignores stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    taken = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in taken}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)

    return restore
