"""The low-bit copies of a prepared model on the disk: one file of numbers, mapped into memory, and an index.

Every tensor begins at a multiple of 64 bytes, so that kernels read whole cache lines. The index says of which weights,
under which policy and in which format the copies are; the cache's manifest has the hashes of both files.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchlamp.models import cache
from torchlamp.models.fingerprint import fingerprint

#: Changes when copies are made or written otherwise than before.
FORMAT = 1
_DATA, _INDEX = "copies.bin", "copies.json"
_ALIGNMENT = 64
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
#: Files of a model's folder that its weights depend on.
_SOURCES = ("*.safetensors", "*.bin", "config.json", "*.index.json")

logger = logging.getLogger("torchlamp.cache")


@dataclass(frozen=True)
class KeptCopies:
    """The place of the copies of one model under one policy, whether there are any or not."""

    entry: Path
    policy: str

    @classmethod
    def of(cls, name: str, where: str, policy: str) -> "KeptCopies":
        """The place for a model: its name, what it is the name of (a path, a packaged model), and a policy's text."""
        stem = Path(name).stem if name.endswith(".gguf") else Path(name).name
        key = hashlib.sha256(f"{where}\n{policy}".encode()).hexdigest()[:16]
        stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem).lstrip(".") or "model"
        return cls(copies_folder() / f"{stem}-copies-{key}", policy)

    def fit(self, weights: str) -> bool:
        """Whether there are copies of these weights under this policy, in today's format; says so if there are others.

        Nothing but the index is read; `find_problem` reads and checks all.
        """
        if not self.entry.exists():
            return False
        try:
            about = json.loads((self.entry / _INDEX).read_bytes())["about"]
        except (OSError, ValueError, KeyError, TypeError):
            return True  # damaged, which is found and said by whoever verifies
        if about == self._about(weights):
            return True
        logger.info("the low-bit copies in %s are of other weights or of another version", self.entry)
        return False

    def find_problem(self) -> str | None:
        """What is wrong with the copies on the disk, in a few words; None if every byte is as it was written."""
        return cache.find_problem(self.entry)

    def read(self) -> dict[str, Tensor]:
        """The copies' tensors, mapped into memory where the system can, else read.

        Raises
        ------
        OSError, ValueError, KeyError, TypeError
            The index or the numbers can't be read, or don't fit together.
        """
        index = json.loads((self.entry / _INDEX).read_bytes())["tensors"]
        data = _mapped(self.entry / _DATA)
        found = {}
        for name, (dtype, shape, start) in index.items():
            kind = _DTYPES[dtype]
            end = start + math.prod(shape) * kind.itemsize
            if start % _ALIGNMENT or not 0 <= start <= end <= len(data):
                raise ValueError(f"{name} doesn't lie within {_DATA}")
            found[name] = data[start:end].view(kind).view(shape)
        cache.note_use(self.entry)
        return found

    def write(self, weights: str, tensors: Mapping[str, Tensor]) -> None:
        """Write copies in the place of those that are there, in one step.

        Raises
        ------
        OSError
            The cache folder can't be written, or the disk is full; what was there is then as it was.
        """
        with cache.locked(self.entry):
            cache.store(self.entry, lambda folder: self._fill(folder, weights, tensors))

    def _fill(self, folder: Path, weights: str, tensors: Mapping[str, Tensor]) -> None:
        index: dict[str, tuple[str, list[int], int]] = {}
        with (folder / _DATA).open("wb") as file:
            for name, tensor in tensors.items():
                file.write(bytes(-file.tell() % _ALIGNMENT))
                index[name] = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape), file.tell())
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        text = json.dumps({"about": self._about(weights), "tensors": index})
        (folder / _INDEX).write_text(text, encoding="utf-8")

    def _about(self, weights: str) -> dict[str, Any]:
        """What copies depend on; transformers says which sites a model has."""
        return {
            "format": FORMAT,
            "transformers": version("transformers"),
            "policy": self.policy,
            "weights": weights,
        }


def copies_folder() -> Path:
    """Where low-bit copies are kept: the folder of converted models."""
    return cache.cache_folder()


def folder_fingerprint(folder: Path) -> str:
    """Identify the weights in a model's folder by the size, time, and first and last MiB of each file."""
    files = sorted({path for pattern in _SOURCES for path in folder.glob(pattern)})
    digest = hashlib.sha256("\n".join(f"{path.name} {fingerprint(path)}" for path in files).encode())
    return digest.hexdigest()


def _mapped(path: Path) -> Tensor:
    """All bytes of a file, uint8 (size,)."""
    size = path.stat().st_size
    try:
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError:  # a file system that maps nothing
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
