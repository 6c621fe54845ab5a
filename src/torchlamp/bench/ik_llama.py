"""ik_llama.cpp as a contestant, through the optional package ik-llama-cpp-python's C interface."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BATCH = 512


class IkLlama:
    """A GGUF file in ik_llama.cpp, on the CPU; keys and values in float16, its default.

    Parameters
    ----------
    path : Path
        The GGUF file.
    length : int
        The most tokens that prompt and steps have together.
    threads : int
        At least 1.

    Raises
    ------
    RuntimeError
        The file can't be loaded, or a call failed.
    """

    def __init__(self, path: Path, length: int, threads: int) -> None:
        from ik_llama_cpp import _ctypes_api as api  # type: ignore[import-not-found, unused-ignore]
        from ik_llama_cpp import _internals as internals

        self._api = api
        self._model = internals.IkModel(str(path))
        self._context = internals.IkContext(self._model, n_ctx=length, n_threads=threads)
        self._batch: Any = api.llama_batch_init(_BATCH, 0, 1)
        self._read = 0

    def prefill(self, tokens: Tensor) -> None:
        """Forget everything and read int64 (length,) tokens."""
        self._clear()
        self._decode(tokens.tolist(), every=False)

    def step(self, token: int) -> Tensor:
        """Read one token more; float32 logits (vocabulary,)."""
        return self._decode([token], every=False)[0]

    def logits(self, tokens: Tensor) -> Tensor:
        """Float32 (length, vocabulary) logits of int64 (length,) tokens."""
        self._clear()
        return self._decode(tokens.tolist(), every=True)

    def close(self) -> None:
        """Free the model; may be called twice."""
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._context.close()
            self._model.close()
        self._batch = None

    def _clear(self) -> None:
        self._context.kv_cache_clear()
        self._read = 0

    def _decode(self, tokens: list[int], every: bool) -> Tensor:
        vocabulary = int(self._model.n_vocab)
        rows = np.empty((len(tokens) if every else 1, vocabulary), dtype=np.float32)
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            last = start + len(part) == len(tokens)
            for index, token in enumerate(part):
                self._batch.token[index], self._batch.pos[index] = token, self._read + index
                self._batch.n_seq_id[index], self._batch.seq_id[index][0] = 1, 0
                self._batch.logits[index] = every or (last and index == len(part) - 1)
            self._batch.n_tokens = len(part)
            if status := self._context.decode(self._batch):
                raise RuntimeError(
                    f"ik_llama.cpp can't decode {len(part)} tokens after {self._read} (status {status})"
                )
            self._read += len(part)
            for index in range(len(part)) if every else [len(part) - 1] * last:
                pointer = ctypes.cast(self._context.get_logits(index), ctypes.POINTER(ctypes.c_float))
                rows[start + index if every else 0] = np.ctypeslib.as_array(pointer, shape=(vocabulary,))
        return torch.from_numpy(rows)
