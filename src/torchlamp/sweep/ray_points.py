"""The points of a sweep on a Ray cluster: which worker gets which point, and what happens when one dies."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from functools import partial

from torchlamp.sweep.config import SweepConfig
from torchlamp.sweep.folder import Outcome
from torchlamp.sweep.points import Group, Point
from torchlamp.sweep.ray_engine import ActorPool
from torchlamp.sweep.worker import Worker

#: A point whose worker died so often is recorded as failed.
MAX_ATTEMPTS = 3


class Queue:
    """The points that wait, by groups: a worker stays with its group, whose references it holds, while it can.

    A worker without a group takes the one that has the most points waiting for each worker that is on it.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self._waiting: dict[Group, list[Point]] = {}
        for point in points:
            self._waiting.setdefault(point.group, []).append(point)
        self._on: dict[int, Group] = {}

    def next(self, worker: int) -> Point | None:
        """The next point for a worker; None if none waits."""
        group = self._on.get(worker)
        if group is None or not self._waiting.get(group):
            self._on.pop(worker, None)
            open_groups = [group for group, points in self._waiting.items() if points]
            if not open_groups:
                return None
            crowd = Counter(self._on.values())
            # Groups without a worker first, in the order of the sweep.
            group = max(open_groups, key=lambda g: (crowd[g] == 0, len(self._waiting[g]) / (1 + crowd[g])))
            self._on[worker] = group
        return self._waiting[group].pop(0)

    def put_back(self, point: Point) -> None:
        """Let a point wait again, before the others of its group."""
        self._waiting[point.group].insert(0, point)


class RayEngine:
    """Computes points in Ray actors; only the process that called it ever writes.

    Parameters
    ----------
    config : SweepConfig
        Its threads (1 by default) are those of each worker.
    workers : int, optional
        Actors; by default one for each processor, or for each so many as a worker has threads.
    threads : int, optional
        In the place of the configuration's.
    """

    def __init__(self, config: SweepConfig, workers: int | None = None, threads: int | None = None) -> None:
        self._threads = threads or config.threads or 1
        self._memory = config.reference_memory
        self._pool: ActorPool | None = None
        self._asked = workers
        #: Until the pool is there, and the cluster is known: what was asked for.
        self.workers = workers or 1

    def run(
        self, points: Sequence[Point], found: Callable[[Point], str | None]
    ) -> Generator[Outcome, None, None]:
        """Compute the points in any order."""
        if not points:
            return
        queue = Queue(points)
        deaths: Counter[Point] = Counter()
        # How many share a machine isn't known; at worst all do.
        make = partial(Worker, self._memory, self._threads, self._asked or 8)
        with ActorPool(make, self._asked, self._threads) as pool:
            self._pool, self.workers = pool, pool.workers
            for done in pool.run(queue.next, lambda point: (point, found(point))):
                if done.death is None:
                    yield done.value
                    continue
                deaths[done.task] += 1
                if deaths[done.task] < MAX_ATTEMPTS:
                    queue.put_back(done.task)
                else:
                    error = f"its worker died {MAX_ATTEMPTS} times, the last time: {done.death}"
                    yield Outcome(done.task, None, error, 0.0)

    def pids(self) -> list[int]:
        """Processes of the workers while `run` runs."""
        return self._pool.pids() if self._pool is not None else []
