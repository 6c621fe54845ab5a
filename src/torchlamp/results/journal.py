"""Files of JSON lines that survive Ctrl-C, `kill -9` and a full disk: whole lines are added, or nothing."""

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlamp.results.result import finite

logger = logging.getLogger("torchlamp.sweep")


@dataclass(frozen=True)
class Lines:
    """The content of a file of JSON lines."""

    records: list[dict[str, Any]]
    #: Bytes of the whole lines.
    size: int
    #: A last line that is broken or has no end: whoever wrote it was stopped, or is writing now.
    torn: bytes


def read_lines(path: Path, schema: str) -> Lines:
    """Read a file of JSON objects, one a line, each with this value of the key "schema".

    Raises
    ------
    FileNotFoundError
        There is no such file.
    OSError
        It can't be read.
    ValueError
        A line is of another version, or is broken and not the last one.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"can't read {str(path)!r}: {error.strerror or error}") from error
    # Not splitlines: a carriage return ends no line.
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    lines = [line for line in lines if line]
    records: list[dict[str, Any]] = []
    size = 0
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the line has no end")
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("a JSON object is expected")
        except (ValueError, RecursionError) as stop:
            # Brackets in brackets by the thousand: no line of ours.
            wrong = "nested too deeply" if isinstance(stop, RecursionError) else str(stop)
            if number == len(lines):
                return Lines(records, size, data[size:])
            raise ValueError(
                f"{str(path)!r}, line {number}: {wrong}; repair or remove that line, or give another folder"
            ) from stop
        if record.get("schema") != schema:
            raise ValueError(
                f"{str(path)!r}, line {number}: schema {record.get('schema')!r} was written by another "
                f"version, this one reads {schema!r}: give another folder, or sweep with --fresh to set the old "
                "results aside"
            )
        records.append(record)
        size += len(line)
    return Lines(records, size, b"")


class Journal:
    """A file of records, one JSON object a line, each with the key "schema".

    Parameters
    ----------
    path : Path
        Made with the first record.
    schema : str
        Value of the key "schema": `read` accepts no other, and `append` writes it.
    """

    def __init__(self, path: Path, schema: str) -> None:
        self.path, self.schema = path, schema

    def read(self) -> list[dict[str, Any]]:
        """All whole records; changes nothing, and passes over a torn last line.

        Raises
        ------
        OSError
            The file can't be read.
        ValueError
            A line is of another version, or is broken and not the last one.
        """
        return self.lines().records

    def recover(self, lines: Lines | None = None) -> list[dict[str, Any]]:
        """All whole records; a torn last line is moved to a file of its own, with a warning.

        Parameters
        ----------
        lines : Lines, optional
            What `lines` returned, if the file was read already and nobody has written to it since.

        Raises
        ------
        OSError, ValueError
            As for `read`; then nothing was changed.
        """
        lines = self.lines() if lines is None else lines
        if lines.torn:
            aside = free_name(self.path.with_suffix(".torn"))
            logger.warning(
                "the last line of %s is torn (%d bytes: a sweep was stopped while it wrote); set aside in %s, "
                "its point is computed again",
                self.path,
                len(lines.torn),
                aside.name,
            )
            aside.write_bytes(lines.torn)
            os.truncate(self.path, lines.size)
        return lines.records

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; when this returns, it is on the disk. Numbers that are not finite become null.

        Raises
        ------
        OSError
            It can't be written, for example because the disk is full; then the file is as it was.
        """
        line = json.dumps(
            finite({"schema": self.schema} | record),
            allow_nan=False,
            ensure_ascii=False,
            separators=(",", ":"),
        )
        data = (line + "\n").encode()
        try:
            new = not self.path.exists()
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(file).st_size
                try:
                    _write_all(file, data)
                    os.fsync(file)
                except BaseException:
                    # Half a line would look torn to the next run; what can't be synced is not promised.
                    with contextlib.suppress(OSError):
                        os.ftruncate(file, size)
                    raise
            finally:
                os.close(file)
            if new:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise OSError(
                f"can't write {str(self.path)!r}: {error.strerror or error}; what was finished before is kept, and "
                "the same command continues from there"
            ) from error

    def lines(self) -> Lines:
        """The file's lines; none if there is no file yet. Raises as `read`, and changes nothing."""
        try:
            return read_lines(self.path, self.schema)
        except FileNotFoundError:
            return Lines([], 0, b"")


def free_name(path: Path) -> Path:
    """The path with the first of -1, -2, ... appended that doesn't exist."""
    number = 1
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate


def _write_all(file: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(file, data[written:])


def _sync_folder(folder: Path) -> None:
    """Make a new file's name durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
