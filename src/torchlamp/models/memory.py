"""How much memory there is, and errors of full memory, which Python, torch, safetensors and the system each have."""

import errno
import os
from pathlib import Path

#: Where control groups, and the one of this process, are told (Linux, versions 2 and 1).
_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

#: Parts of the messages of torch, safetensors, C++ and Linux.
_WORDS = (
    "cannot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "unable to mmap",
    "bad_alloc",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that there is no memory, address space or thread left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        if any(words in str(seen).lower() for words in _WORDS):
            return True
        seen = seen.__cause__
    return False


def machine_memory() -> int:
    """Bytes of memory that the machine has, or that the containers of this process (control groups) allow, if less.

    Where the system tells nothing, 2^63 - 1.
    """
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        installed = 2**63 - 1
    return min([installed, *_limits()])


def _limits() -> list[int]:
    """Limits of the process's control group and of all above it."""
    groups = {_GROUPS / "memory.max", _GROUPS / "memory" / "memory.limit_in_bytes"}
    try:
        for line in _OWN.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for part in (Path(path), *Path(path).parents):
                inside = str(part).lstrip("/")
                if not controllers:
                    groups.add(_GROUPS / inside / "memory.max")
                elif "memory" in controllers.split(","):
                    groups.add(_GROUPS / "memory" / inside / "memory.limit_in_bytes")
    except (OSError, ValueError):
        pass
    return [limit for limit in map(_limit, groups) if limit is not None]


def _limit(file: Path) -> int | None:
    """The bytes that a control group allows; None: there is none, or it has no limit ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
