"""The header of a GGUF file: its settings, and where its last tensor ends; so that a cut file is refused at once.

The format is that of llama.cpp's ``gguf.md``, versions 2 and 3, little endian: magic, version, counts, settings,
tensors with their offsets, padding to the alignment, data.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
#: Type number -> struct's letter; 8 is a string and 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself; arrays are left out."""

    settings: dict[str, Any]
    #: Bytes that the file has if it is whole; None where a tensor's type isn't known.
    size: int | None
    #: Of all tensors together.
    numbers: int = 0

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can read, if the file says so."""
        found = self.settings.get(f"{self.settings.get('general.architecture')}.context_length")
        return found if isinstance(found, int) else None


def read_header(path: Path) -> GgufHeader | None:
    """The header of a file; None for one that is no GGUF file, or of a version that isn't known.

    Raises
    ------
    OSError
        The file can't be read.
    ValueError
        It ends within its header.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).header()
            except (struct.error, IndexError):
                raise ValueError(
                    f"model {str(path)!r} is truncated: its header goes on behind the end of the file, {len(data)} "
                    "bytes; get it again"
                ) from None


def check_not_cut(path: Path) -> None:
    """ValueError for a GGUF file that is shorter than its header says; other files pass.

    Raises
    ------
    OSError
        The file can't be read.
    """
    header = read_header(path)
    size = path.stat().st_size
    if header is not None and header.size is not None and size < header.size:
        raise ValueError(
            f"model {str(path)!r} is truncated: it has {size} of the {header.size} bytes that its header names; get it "
            "again"
        )


class _Reader:
    """Reads one field after the other; struct.error or IndexError where the file ends first."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._numbers = data, 4, 0

    def header(self) -> GgufHeader | None:
        if self._scalar("I") not in _VERSIONS:
            return None
        tensors, count = self._scalar("Q"), self._scalar("Q")
        settings: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            value = self._value(self._scalar("I"))
            if value is not None:
                settings[key] = value
        ends = [self._tensor() for _ in range(tensors)]
        alignment = settings.get("general.alignment", _ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        known = [end for end in ends if end is not None]
        end = start + max(known, default=0) if len(known) == len(ends) else None
        return GgufHeader(settings, end, self._numbers)

    def _tensor(self) -> int | None:
        """Where a tensor ends, behind the start of the data; None: its type isn't known."""
        from gguf import GGML_QUANT_SIZES

        self._string()
        numbers = 1
        for _ in range(self._scalar("I")):
            numbers *= self._scalar("Q")
        self._numbers += numbers
        kind, offset = self._scalar("I"), self._scalar("Q")
        block = next((sizes for known, sizes in GGML_QUANT_SIZES.items() if known == kind), None)
        return None if block is None else offset + numbers // block[0] * block[1]

    def _value(self, kind: int) -> Any:
        """A setting; None for an array, which is passed over."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            return None
        for _ in range(count):
            if inner == _STRING:
                self._skip(self._scalar("Q"))
            else:
                self._value(inner)
        return None

    def _scalar(self, letter: str) -> Any:
        form = f"<{letter}"
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        start = self._at
        self._skip(length)
        return self._data[start : self._at].decode("utf-8", "replace")

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise IndexError("the file ends here")
