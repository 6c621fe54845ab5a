"""Full-precision weights that stay in their file: mapped into memory, read where they are asked for, and let go again.

transformers maps a safetensors file and makes parameters of it without reading it: a page of the file takes memory
when it is first read, and takes none again once the kernel is told that it isn't needed. What is dropped is read anew
from the file (mostly from the system's own copy of it) at its next use, so that results don't change.
"""

import ctypes
import mmap
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

#: Of the file's bytes, how much may be read before all of it is let go.
_SHARE = 64
_LEAST = 1 << 20
#: What the kernel maps around a page that is read.
_AROUND = 1 << 16
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ....? [0-9a-f]+ \S+ (\d+)\s*(.*)$")
_MADV_DONTNEED = 4


@dataclass(frozen=True)
class Mapping:
    """Addresses that show a file, and how many bytes there no longer are the file's."""

    start: int
    end: int
    path: str
    changed: int


class FileWeights:
    """The matrices of a model that lie in memory-mapped files.

    Told what is read, it lets go of everything whenever that exceeds a 64th of all (or 1 MiB).

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters of two dimensions and more must lie in files, as they are after `load` of a folder or a packaged
        model, and unchanged.

    Raises
    ------
    ValueError
        A matrix that lies in no file, or was changed since it was read; a system other than Linux.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
        mappings = file_mappings()
        found = {name: _mapping_of(tensor, mappings) for name, tensor in named.items()}
        for name, mapping in found.items():
            if mapping is None:
                raise ValueError(
                    f"resident=False: {name} lies in no file that is mapped into memory; write the model by "
                    'save_pretrained and load that folder with dtype="auto"'
                )
            if mapping.changed:
                raise ValueError(
                    f"resident=False: weights were changed since they were read from {mapping.path}; write the model "
                    'by save_pretrained and load that folder with dtype="auto"'
                )
        # As long as these are there, the addresses are theirs: dropping pages of other memory would destroy it.
        self._kept = list(named.values())
        self._ranges = _joined([(t.data_ptr(), t.data_ptr() + t.nbytes) for t in self._kept])
        self._budget = max(self.bytes // _SHARE, _LEAST)
        self._read = 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Let go of these, too, as far as they lie in mapped files: full-precision copies that are read by rows."""
        mappings = file_mappings()
        found = [t for t in tensors if (m := _mapping_of(t, mappings)) is not None and not m.changed]
        self._kept += found
        self._ranges = _joined([*self._ranges, *((t.data_ptr(), t.data_ptr() + t.nbytes) for t in found)])

    @property
    def bytes(self) -> int:
        """Of all matrices."""
        return sum(end - start for start, end in self._ranges)

    def read_matrices(self, module: nn.Module) -> None:
        """Note that all matrices which a module owns were read."""
        self._note(sum(p.nbytes for p in module._parameters.values() if p is not None and p.ndim > 1))

    def read_rows(self, count: int) -> None:
        """Note that so many rows of matrices were read."""
        self._note(count * _AROUND)

    def settle(self) -> None:
        """Let go of everything that was read, and of memory that a prompt or a copy took for the moment."""
        self.release()
        _trim()

    def release(self) -> None:
        """Let go of everything that was read."""
        self._read = 0
        for start, end in self._ranges:
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)

    def _note(self, count: int) -> None:
        self._read += count
        if self._read > self._budget:
            self.release()

    def __getstate__(self) -> dict[str, Any]:
        # A copied model's weights are in memory of their own.
        return {"_kept": [], "_ranges": [], "_budget": sys.maxsize, "_read": 0}


def file_mappings() -> list[Mapping]:
    """The files that are mapped into this process, in the order of their addresses; empty where Linux's /proc isn't."""
    found: list[Mapping] = []
    current: tuple[int, int, str] | None = None
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if match := _MAPPING.match(line):
                    start, end, inode, path = match.groups()
                    current = (int(start, 16), int(end, 16), path) if int(inode) else None
                elif current is not None and line.startswith("Anonymous:"):
                    found.append(Mapping(*current, int(line.split()[1]) << 10))
    except OSError:
        return []
    return found


def _trim() -> None:
    """Give memory that was freed back to the system, where its C library keeps it (glibc)."""
    give_back = getattr(_libc(), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if give_back is not None:
        give_back(0)


def _libc() -> Any:
    return ctypes.CDLL(None)


def _mapping_of(tensor: Tensor, mappings: list[Mapping]) -> Mapping | None:
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    inside = (m for m in mappings if m.start <= first and last <= m.end and tensor.is_contiguous())
    return next(inside, None)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Whole pages that hold these addresses, those that touch each other as one; all of them lie in mapped files."""
    joined: list[tuple[int, int]] = []
    page = mmap.PAGESIZE
    for start, end in sorted((start // page * page, -(-end // page) * page) for start, end in ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
