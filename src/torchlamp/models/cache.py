"""A cache of converted models and low-bit copies: whole folders, written atomically and verified at every use.

An entry holds a manifest with the SHA-256 of every 16 MiB piece of every file. Pieces are hashed by a few
threads, so that checking half a gigabyte takes a few tenths of a second and a flipped byte or a cut file
never goes unnoticed.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlamp.models.memory import is_out_of_memory

MANIFEST = "manifest.json"
_PIECE = 1 << 24
_BUFFER = 1 << 18
#: Names of entries, and of the folders in which they are written.
_ENTRY = re.compile(r"[^.].*-[0-9a-f]{16}")
_COPIES = re.compile(r"-copies-[0-9a-f]{16}(\.tmp-.*)?$")
_LEFTOVER = re.compile(r"\..+-[0-9a-f]{16}\.tmp-.*")

logger = logging.getLogger("torchlamp.cache")


def cache_folder() -> Path:
    """``$TORCHLAMP_CACHE``, ``$XDG_CACHE_HOME/torchlamp`` or ``~/.cache/torchlamp``; it need not exist."""
    if own := os.environ.get("TORCHLAMP_CACHE"):
        return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "torchlamp"
    return Path.home() / ".cache" / "torchlamp"


def find_problem(entry: Path, trusted: Collection[str] = ()) -> str | None:
    """What is wrong with an entry, in a few words; None if every byte is as it was written.

    Of files named in `trusted` only the size is compared: their content is known to be right from elsewhere.

    Full memory, which says nothing about the entry, is raised as OSError, MemoryError or RuntimeError.
    """
    try:
        manifest = json.loads((entry / MANIFEST).read_bytes())
        files: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["digest"] != _digest(files):
            return f"{MANIFEST} was changed"
        for name, expected in files.items():
            size = (entry / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
        for name, expected in files.items():
            if name not in trusted and _pieces(entry / name) != expected["sha256"]:
                return f"{name} has changed content"
    except OSError as error:
        if is_out_of_memory(error):
            raise
        return f"{Path(error.filename or entry).name} can't be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    return None


@contextmanager
def locked(entry: Path) -> Iterator[None]:
    """Make the cache folder if need be, and keep other processes from writing this entry.

    Raises
    ------
    OSError
        The cache folder can't be made or written.
    """
    # Only a writer needs it: reading an entry takes no lock and works on a read-only disk.
    from filelock import FileLock, Timeout

    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(entry.parent / f".{entry.name}.lock"))
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        logger.info("another process is writing %s; waiting for it", entry.name)
        lock.acquire()
    except NotImplementedError:
        # A file system without locks: two writers then do the work twice, and the renames still keep entries
        # whole.
        yield
        return
    try:
        yield
    finally:
        lock.release()


def store(entry: Path, fill: Callable[[Path], None]) -> None:
    """Write an entry: `fill` writes files into a new folder, which then takes the entry's place in one step.

    Call it within `locked`. What earlier writers of this entry left behind when they were killed is removed.

    Raises
    ------
    OSError
        A file couldn't be written (a full disk, for example); the entry is then as it was before.
    """
    prefix = f".{entry.name}.tmp-"
    for leftover in entry.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=entry.parent))
    try:
        fill(folder)
        files = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _pieces(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        (folder / MANIFEST).write_text(json.dumps({"digest": _digest(files), "files": files}, indent=1))
        for path in folder.rglob("*"):
            _flush(path)
        if entry.exists():
            # Into a folder of its own: what is in the way may be a file.
            entry.rename(Path(tempfile.mkdtemp(prefix=prefix, dir=entry.parent)) / "old")
        folder.rename(entry)
        _flush(entry.parent)
    finally:
        for leftover in entry.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True)
class Entry:
    """A converted model or low-bit copies in the cache folder, or what a writer that was killed left of one."""

    path: Path
    #: Bytes on the disk.
    size: int
    #: When it was last read or written, in seconds since 1970.
    used: float
    #: False: it was never finished.
    whole: bool

    @property
    def kind(self) -> str:
        """What it holds: "converted model" or "low-bit copies"."""
        return "low-bit copies" if _COPIES.search(self.name) else "converted model"

    @property
    def name(self) -> str:
        """The folder's name: that of the model or file and a hash of its content and of what converted it."""
        return self.path.name


def entries() -> list[Entry]:
    """Everything in the cache folder that `store` wrote, last used first; nothing else that may lie there."""
    folder = cache_folder()
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        whole = _ENTRY.fullmatch(path.name) is not None
        if path.is_dir() and (whole or _LEFTOVER.fullmatch(path.name)):
            manifest = path / MANIFEST
            used = (manifest if manifest.is_file() else path).stat().st_mtime
            found.append(Entry(path, entry_size(path), used, whole and manifest.is_file()))
    return sorted(found, key=lambda entry: -entry.used)


def remove(entry: Entry) -> None:
    """Delete an entry; whoever has mapped its files keeps them until the end of the process.

    Raises
    ------
    OSError
        A file can't be deleted.
    """
    stem = entry.name if entry.whole else entry.name.removeprefix(".").partition(".tmp-")[0]
    with locked(entry.path.parent / stem):
        # Moved away in one step: nobody finds half an entry.
        gone = Path(tempfile.mkdtemp(prefix=f".{stem}.tmp-", dir=entry.path.parent))
        entry.path.rename(gone / "old")
        shutil.rmtree(gone)


def note_use(entry: Path) -> None:
    """Note that an entry is used now, if its folder can be written."""
    with contextlib.suppress(OSError):
        os.utime(entry / MANIFEST)


def entry_size(entry: Path) -> int:
    """Bytes that an entry takes; 0 if it isn't there."""
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())


def _digest(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _pieces(path: Path) -> list[str]:
    """SHA-256 of each piece of a file, in order."""
    size = path.stat().st_size

    def hash_piece(start: int) -> str:
        # Through a small buffer: what a thread allocates its C library may keep.
        digest, left, buffer = hashlib.sha256(), min(_PIECE, size - start), memoryview(bytearray(_BUFFER))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left > 0 and (count := file.readinto(buffer[: min(left, _BUFFER)])):
                digest.update(buffer[:count])
                left -= count
        return digest.hexdigest()

    # Hashing and reading release the interpreter's lock.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_piece, range(0, size, _PIECE)))


def _flush(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's names where the system allows that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows doesn't open folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
