"""Ray: a pool of actors that compute tasks, and lives on when one of them dies.

Nothing here knows what the tasks are. Needs the extra ``ray``, which is imported when a pool is made.
"""

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

logger = logging.getLogger("torchlamp.ray")

Task = TypeVar("Task")
#: An actor that ends so often before it has computed anything will not do better the next time.
_MAX_FALSE_STARTS = 3
#: Seconds that a cluster has to answer, and to say that it is well.
_PATIENCE, _CHECKUP = 10.0, 30.0
#: How a client of HTTP/2, which Ray speaks, begins: the preface, and a frame of no settings.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
#: Type of a frame of settings, with which every server of HTTP/2 answers: byte 3 of its head of 9.
_SETTINGS = 4


class Computes(Protocol):
    """The object in an actor: one method that computes a task."""

    def compute(self, *arguments: Any) -> Any:
        """Compute a task from its arguments."""
        ...


@dataclass(frozen=True)
class Done(Generic[Task]):
    """A task and what computing it gave, or, if its actor died, how."""

    task: Task
    value: Any
    death: str | None = None


class _Held:
    """The body of an actor."""

    def __init__(self, make: Callable[[], Computes]) -> None:
        self._held = make()

    def compute(self, *arguments: Any) -> Any:
        return self._held.compute(*arguments)

    def pid(self) -> int:
        return os.getpid()


def check_address(address: str) -> None:
    """Find out that no cluster answers at its address, for which Ray itself takes minutes and then ends the process.

    Parameters
    ----------
    address : str
        A host and a port, ``ray://`` before them or not; other words, such as ``auto``, are Ray's to understand.

    Raises
    ------
    OSError
        Nobody answers within `_PATIENCE` seconds, or a server that isn't Ray does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE) as connection:
            connection.sendall(_HELLO)
            head = connection.recv(9)
    except TimeoutError as error:
        raise _no_cluster(address, f"no answer within {_PATIENCE:.0f} s") from error
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _no_cluster(address, reason) from error
    if len(head) < 4 or head[3] != _SETTINGS:
        raise _no_cluster(address, "another server does")
    if not address.startswith("ray://") and not _is_well(address):
        raise _no_cluster(address, "another server does, or the cluster isn't well")


def _is_well(address: str) -> bool:
    """Whether Ray's own check, in a process that can be ended, finds a cluster."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        return subprocess.run(command, capture_output=True, timeout=_CHECKUP).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _no_cluster(address: str, reason: str) -> OSError:
    return OSError(
        f"RAY_ADDRESS={address!r}: no Ray cluster answers there ({reason}); start one, or unset the variable to "
        "compute on this machine"
    )


class ActorPool:
    """Actors on the cluster that the environment names (``RAY_ADDRESS``), or else on this machine.

    A context manager: at its end the actors end, and so does Ray if the pool started it.

    Parameters
    ----------
    make : callable
        Makes what an actor holds; runs in the actor's process, so it must be picklable.
    workers : int, optional
        Number of actors; by default as many as the cluster has processors for.
    processors : int
        Processors that each actor occupies.

    Raises
    ------
    ValueError
        Ray isn't installed, or the cluster has too few processors.
    OSError
        No actor could be started.
    """

    def __init__(self, make: Callable[[], Computes], workers: int | None = None, processors: int = 1) -> None:
        # A sweep's results are nobody else's business; whoever wants to report usage sets the variable.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ValueError("--engine ray needs Ray: run pip install 'torchlamp[ray]'") from error
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            self._start(workers, processors)
        have = int(ray.cluster_resources().get("CPU", 0)) // processors
        if have < (workers or 1):
            self.close()
            raise ValueError(
                f"{workers or 1} Ray workers of {processors} processors each: the cluster has room for {have}; give "
                "fewer workers or threads"
            )
        self.workers = workers or have
        self._make = make
        self._kind = ray.remote(_Held).options(num_cpus=processors, max_restarts=0)
        self._actors = [self._kind.remote(make) for _ in range(self.workers)]
        try:
            ray.get(self._actors[0].pid.remote())
        except ray.exceptions.RayError as error:
            self.close()
            raise OSError(f"no Ray worker could be started: {_cause(error)}") from error

    def _start(self, workers: int | None, processors: int) -> None:
        options: dict[str, Any] = {
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": "ERROR",
        }
        if address := os.environ.get("RAY_ADDRESS"):
            check_address(address)
        else:
            # As many slots as workers are asked for, even if that is more than there are processors.
            options["num_cpus"] = max((workers or 0) * processors, os.cpu_count() or 1)
        self._ray.init(**options)

    def pids(self) -> list[int]:
        """The process of each actor, on its own machine."""
        return [int(pid) for pid in self._ray.get([actor.pid.remote() for actor in self._actors])]

    def run(
        self, next_task: Callable[[int], Task | None], arguments: Callable[[Task], tuple[Any, ...]]
    ) -> Iterator[Done[Task]]:
        """Keep the actors busy, and yield tasks as they end, until there are none left.

        Parameters
        ----------
        next_task : callable
            Gives the next task for the actor of a number, or None if there is none at the moment. A task that was
            yielded with a death may be given again.
        arguments : callable
            Arguments of the actor's `compute` for a task.

        Raises
        ------
        OSError
            Actors die one after the other without computing anything.
        """
        ray = self._ray
        running: dict[Any, tuple[int, Task]] = {}
        idle = set(range(self.workers))
        false_starts = 0
        while True:
            for worker in sorted(idle):
                task = next_task(worker)
                if task is not None:
                    running[self._actors[worker].compute.remote(*arguments(task))] = (worker, task)
                    idle.discard(worker)
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            worker, task = running.pop(ready[0])
            idle.add(worker)
            try:
                done = Done(task, ray.get(ready[0]))
                false_starts = 0
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                false_starts += 1
                logger.warning("a Ray worker died and is replaced: %s", _cause(error))
                ray.kill(self._actors[worker])
                self._actors[worker] = self._kind.remote(self._make)
                done = Done(task, None, _cause(error))
            yield done
            if false_starts > _MAX_FALSE_STARTS * self.workers:
                raise OSError(f"Ray workers die one after the other: {done.death}")

    def close(self) -> None:
        """End the actors, and Ray if the pool started it."""
        for actor in getattr(self, "_actors", []):
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def __enter__(self) -> "ActorPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _cause(error: BaseException) -> str:
    """One line of Ray's many: what stopped the actor."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    # An error in the making of what an actor holds ends with that error, after its traceback.
    return lines[-1] if "creation task" in lines[0] else lines[0]
