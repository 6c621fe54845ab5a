"""A packaged model with the weights it has now, in llama.cpp: contestants of `torchlamp bench decode`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchlamp.bench import llama_cpp
from torchlamp.bench.gguf_export import write_gguf
from torchlamp.models.packaged import PACKAGED


class LlamaFiles:
    """GGUF files of one model in a folder; each is made when it is first asked for."""

    def __init__(self, name: str, model: Any, folder: Path) -> None:
        self.folder = folder
        with PACKAGED[name].gguf() as packaged:
            write_gguf(model, self._path("F32"), packaged)

    def decoder(self, quantisation: str, length: int) -> "LlamaDecoder":
        """A decoder of up to `length` tokens; raises as `llama_cpp.quantise` does."""
        path = self._path(quantisation)
        if not path.exists():
            llama_cpp.quantise(self._path("F32"), path, quantisation, torch.get_num_threads())
        return LlamaDecoder(path, length)

    def _path(self, quantisation: str) -> Path:
        return self.folder / f"{quantisation}.gguf"


class LlamaDecoder:
    """A GGUF file in llama.cpp, with torch's number of threads; keys and values in float16, llama.cpp's default."""

    def __init__(self, path: Path, length: int) -> None:
        self._llama = llama_cpp.LlamaCpp(path, length, torch.get_num_threads())

    def prefill(self, tokens: Tensor) -> None:
        """Read int64 (length,) tokens."""
        self._llama.prefill(tokens.tolist())

    def step(self, token: int) -> Tensor:
        """Read one token more; float32 logits (vocabulary,)."""
        return torch.from_numpy(self._llama.step(token))

    def logits(self, tokens: Tensor) -> Tensor:
        """Float32 (length, vocabulary) logits of int64 (length,) tokens."""
        return torch.from_numpy(self._llama.logits(tokens.tolist()))

    def close(self) -> None:
        """Free the model."""
        self._llama.close()


@contextmanager
def llama_files(name: str, model: Any) -> Iterator[LlamaFiles | None]:
    """Files of a packaged model's current weights within the block; None without the package llama-cpp-python."""
    if not llama_cpp.available():
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="torchlamp-") as folder:
        yield LlamaFiles(name, model, Path(folder))
