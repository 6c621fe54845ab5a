"""Timings taken in turns, their medians, and the project's targets beside them.

Each benchmark times its contestants interleaved, so that a busy machine slows all of them alike, and quotes
ratios of medians. docs/performance.md explains what each target means and where its limit comes from.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


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
    #: Figures that only one benchmark has, by name.
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A figure with the limit that the project set itself."""

    label: str
    value: float
    limit: float
    #: True: at least `limit`; False: at most.
    at_least: bool = False
    #: False: of a quick run, for which the limit wasn't set.
    judged: bool = True

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
    #: Contestants without figures, and why: not installed, with the command; or what failed.
    absent: dict[str, str] = field(default_factory=dict)


@dataclass
class Watch:
    """What a benchmark is asked, and whom it tells how far it is."""

    #: Few and small measurements: whether everything runs, and rough figures.
    quick: bool = False
    #: The model to measure; None: the benchmark's own.
    model: str | None = None
    #: Told what runs, how many of its steps are done, and of how many.
    step: Callable[[str, int, int], None] = field(default=lambda what, done, total: None)
    #: Told the figures of the part that is being measured, as far as they go.
    so_far: Callable[[Bench], None] = field(default=lambda bench: None)


def interleaved(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    work: dict[str, float] | None = None,
    pause: float = 0.0,
    after_turn: Callable[[int, list[Timing]], None] | None = None,
) -> list[Timing]:
    """Time every call `repeats` times, all of them in turns, after one turn that isn't counted.

    `work` gives the rounded FMAs of the calls that do any. `pause` seconds pass before each call, in which threads that
    another one left spinning go to sleep; then the call is made once untimed, so that its own are awake. `after_turn`
    is told how many turns are done, and the timings until then.
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
        if turn and after_turn is not None:
            after_turn(turn, _timings(times, work))
    return _timings(times, work)


def _timings(times: dict[str, list[float]], work: dict[str, float] | None) -> list[Timing]:
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


def watch_turns(
    watch: Watch, title: str, turns: int, change: Callable[[list[Timing]], list[Timing]] | None = None
) -> Callable[[int, list[Timing]], None]:
    """What `interleaved` tells after each turn, told to a watch; `change` makes a benchmark's figures of timings."""

    def tell(done: int, timings: list[Timing]) -> None:
        watch.so_far(Bench(title, timings if change is None else change(timings), []))
        watch.step(title, done, turns)

    return tell
