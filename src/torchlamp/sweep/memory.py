"""The memory that a process can still have."""

import os
from pathlib import Path

#: Taken where the system doesn't tell.
_UNKNOWN = 2 * 10**9
_MEMINFO, _CONTROL_GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that this process could have now: what the machine has left, and no more than its container allows."""
    allowed = _control_group()
    free = _machine()
    return free if allowed is None else min(free, allowed)


def _machine() -> int:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN


def _control_group() -> int | None:
    """Bytes that a container (Linux control groups, version 2) has left; None without a limit."""
    try:
        limit = (_CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((_CONTROL_GROUP / "memory.current").read_text())
        return None if limit == "max" else max(int(limit) - used, 0)
    except (OSError, ValueError):
        return None
