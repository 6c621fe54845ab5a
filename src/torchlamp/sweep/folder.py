"""The folder of a sweep: its results, calibrations and configuration, held by one process at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchlamp
from torchlamp.results.journal import Journal, free_name
from torchlamp.results.output import write_text
from torchlamp.results.sweep_file import RESULTS, SCHEMA, last_of_each, record_problem
from torchlamp.sweep.config import SweepConfig
from torchlamp.sweep.points import Point

CALIBRATION_SCHEMA = "torchlamp-calibration/1"
CALIBRATIONS, CONFIGURATION, LOCK = "calibrations.jsonl", "sweep.json", ".lock"


@dataclass(frozen=True)
class Outcome:
    """The outcome of computing a point: a result as a dictionary, or an error in one line."""

    point: Point
    result: dict[str, Any] | None
    error: str | None
    seconds: float
    #: The calibration that was made for it, if one was: "key", "calibration", "policy", "rate", "tries" (thresholds
    #: that were tried).
    calibration: dict[str, Any] | None = None


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The records of a sweep's folder, one a point: of a point that was tried again, the last one.

    Raises
    ------
    OSError, ValueError
        As for `Journal.read`.
    """
    return list(last_of_each(Journal(folder / RESULTS, SCHEMA).read()).values())


class Folder:
    """An open folder; `open_folder` makes one.

    Attributes
    ----------
    records : dict
        The last record of each point that was ever tried here, by key.
    calibrations : dict
        Spelling of the policy that a calibration found, by its key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results = Journal(path / RESULTS, SCHEMA)
        self._calibrations = Journal(path / CALIBRATIONS, CALIBRATION_SCHEMA)
        # Both are read before either is changed: an error leaves both as they were.
        results, calibrations = self._results.lines(), self._calibrations.lines()
        for number, record in enumerate(results.records, start=1):
            if (reason := record_problem(record)) is not None:
                raise _foreign(path / RESULTS, number, reason)
        for number, record in enumerate(calibrations.records, start=1):
            if not isinstance(record.get("key"), str) or not isinstance(record.get("policy"), str):
                raise _foreign(path / CALIBRATIONS, number, "lacks key or policy")
        self.records = last_of_each(self._results.recover(results))
        self.calibrations = {c["key"]: str(c["policy"]) for c in self._calibrations.recover(calibrations)}

    def done(self, point: Point) -> bool:
        """Whether the point has a result; a failed one has none."""
        return self.records.get(point.key, {}).get("status") == "done"

    def add(self, outcome: Outcome) -> None:
        """Write down an outcome; it is on the disk when this returns. OSError if it can't be written."""
        if outcome.calibration is not None:
            self._calibrations.append(outcome.calibration)
            self.calibrations[outcome.calibration["key"]] = outcome.calibration["policy"]
        record = {
            "key": outcome.point.key,
            "point": outcome.point.to_dict(),
            "status": "failed" if outcome.result is None else "done",
            "error": outcome.error,
            "seconds": round(outcome.seconds, 3),
            "result": outcome.result,
        }
        self._results.append(record)
        self.records[outcome.point.key] = record

    def write_configuration(self, config: SweepConfig) -> None:
        """Write sweep.json in one step."""
        record = {"schema": SCHEMA, "torchlamp": torchlamp.__version__} | config.to_dict()
        write_text(self.path / CONFIGURATION, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _foreign(path: Path, number: int, reason: str) -> ValueError:
    return ValueError(
        f"{str(path)!r}, line {number} {reason}: no sweep wrote it; repair or remove that line, or give another folder"
    )


@contextmanager
def open_folder(path: Path, *, fresh: bool = False) -> Iterator[Folder]:
    """Hold a sweep's folder, made if it is missing, for this process alone.

    Parameters
    ----------
    path : Path
        The folder.
    fresh : bool
        Move what is there to a folder ``old-<n>`` inside it first.

    Raises
    ------
    OSError
        It is a file, another sweep holds it, or it can't be written.
    ValueError
        It holds results of another version.
    """
    from filelock import FileLock, Timeout

    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"can't sweep into {str(path)!r}: it is a file, give a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Of the operating system: it ends with the process, however that ends.
        lock = FileLock(path / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"another sweep is writing to {str(path)!r}: wait for it, or give another folder"
        ) from None
    except OSError as error:
        raise OSError(f"can't sweep into {str(path)!r}: {error.strerror or error}") from error
    try:
        if fresh:
            _move_aside(path)
        yield Folder(path)
    finally:
        lock.release()


def _move_aside(path: Path) -> None:
    """Move the files of an earlier sweep into old-<n>; results first, so that a stop in between loses nothing."""
    names = [RESULTS, CALIBRATIONS, CONFIGURATION, *sorted(p.name for p in path.glob("*.torn-*"))]
    present = [name for name in names if (path / name).exists()]
    if present:
        aside = free_name(path / "old")
        aside.mkdir()
        for name in present:
            (path / name).rename(aside / name)
