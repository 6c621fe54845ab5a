"""`torchlamp sweep`: compute the points of a sweep that a folder doesn't hold yet, and write each one down at once."""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torchlamp.sweep.config import SweepConfig
from torchlamp.sweep.estimate import Estimate
from torchlamp.sweep.folder import Folder, Outcome
from torchlamp.sweep.points import Point
from torchlamp.sweep.worker import Worker, calibration_key


@dataclass(frozen=True)
class SweepProgress:
    """State of a sweep: handed to the `progress` callback when it starts and after every point."""

    #: Points of the sweep with a result, those that failed in this run, and all.
    done: int
    failed: int
    total: int
    #: The point that has just ended (None at the start), and one that is being computed (None at the end).
    last: Outcome | None
    current: Point | None
    #: Seconds since the start, and an estimate of those to come; None before there is anything to go by.
    elapsed: float
    remaining: float | None


@dataclass(frozen=True)
class Summary:
    """Numbers of points of a sweep that has ended, and its seconds."""

    total: int
    #: Points that had a result before, that got one now, that failed now, and that are left.
    skipped: int
    done: int
    failed: int
    left: int
    seconds: float
    #: The error of the last point that failed now.
    last_error: str | None


class Engine(Protocol):
    """Computes points in any order and yields each outcome as it comes."""

    #: Points computed at the same time.
    workers: int

    def run(
        self, points: Sequence[Point], found: Callable[[Point], str | None]
    ) -> Generator[Outcome, None, None]:
        """Compute the points; `found` gives the policy that an earlier calibration found, if there is one."""
        ...


class LocalEngine:
    """Computes in this process, one point after the other."""

    workers = 1

    def __init__(self, config: SweepConfig, threads: int | None = None) -> None:
        self._worker = Worker(config.reference_memory, threads or config.threads)

    def run(
        self, points: Sequence[Point], found: Callable[[Point], str | None]
    ) -> Generator[Outcome, None, None]:
        """Compute the points in their order."""
        for point in points:
            yield self._worker.compute(point, found(point))


def sweep(
    config: SweepConfig,
    folder: Folder,
    engine: Engine,
    *,
    limit: int | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
) -> Summary:
    """Compute every point of a sweep that has no result in the folder; failed ones are tried again.

    Parameters
    ----------
    config, folder, engine
        The points to compute, where their results go, and the engine that computes them.
    limit : int, optional
        Compute at most so many points now.
    progress : callable, optional
        Called with a `SweepProgress` (times in seconds) at the start and after every point.

    Returns
    -------
    Summary
        Numbers of points.

    Raises
    ------
    OSError
        A result can't be written, for example because the disk is full: the sweep stops, and all that was written
        before stays.
    KeyboardInterrupt
        Interrupted; the point being computed is lost, nothing else.
    """
    start = time.perf_counter()
    points = config.points
    todo = [point for point in points if not folder.done(point)]
    skipped = len(points) - len(todo)
    now = todo[:limit]
    folder.write_configuration(config)
    estimate = Estimate(folder.records.values())
    waiting = dict.fromkeys(now)
    done = failed = 0
    last_error: str | None = None

    def report(last: Outcome | None) -> None:
        if progress is None:
            return
        remaining = estimate.seconds(waiting)
        progress(
            SweepProgress(
                done=skipped + done,
                failed=failed,
                total=len(points),
                last=last,
                current=next(iter(waiting), None),
                elapsed=time.perf_counter() - start,
                remaining=None if remaining is None else remaining / engine.workers,
            )
        )

    def found(point: Point) -> str | None:
        return None if point.target_rate is None else folder.calibrations.get(calibration_key(point))

    report(None)
    # Closed at once when something is raised here: an engine's workers must not go on computing.
    with contextlib.closing(engine.run(now, found)) as outcomes:
        for outcome in outcomes:
            folder.add(outcome)
            del waiting[outcome.point]
            if outcome.error is None:
                done += 1
                estimate.add(outcome.point, outcome.seconds)
            else:
                failed += 1
                last_error = f"{outcome.point}: {outcome.error}"
            report(outcome)
    return Summary(
        len(points), skipped, done, failed, len(todo) - done - failed, time.perf_counter() - start, last_error
    )
