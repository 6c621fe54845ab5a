"""llama.cpp as a contestant: a GGUF file quantised by it, and decoded by it one token at a time.

It runs through the optional package llama-cpp-python, by its C interface: that package's own class `Llama` switches
flash attention off and keeps the keys and values of the whole context in layers with a sliding window, and both cost
llama.cpp speed.
"""

import ctypes
import importlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Formats of the key-value cache; f16 is llama.cpp's default.
CACHE_TYPES = ("f16", "q8_0", "f32")
QUANTISATIONS = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "F16", "BF16")
_BATCH = 512
#: Severity of llama.cpp's log messages.
_ERROR = 4


def available() -> bool:
    """Whether the package llama-cpp-python is installed and its library can be loaded."""
    try:
        _library()
    except ImportError:
        return False
    return True


def quantise(source: Path, target: Path, quantisation: str, threads: int = 2) -> None:
    """Quantise a float32 GGUF file, every tensor as llama.cpp's own defaults say.

    Where a row is no multiple of 256 long, the tensors that Q4_0 keeps in 6 bits (the LM head) get 8.

    Parameters
    ----------
    source, target : Path
        GGUF files; `target` is replaced.
    quantisation : str
        One of `QUANTISATIONS`.
    threads : int
        At least 1.

    Raises
    ------
    ValueError
        Another quantisation.
    OSError
        llama.cpp can't do it; the message holds its reason.
    ImportError
        llama-cpp-python is missing; says what to run.
    """
    _check_choice("quantisation", quantisation, QUANTISATIONS)
    library = _library()
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{quantisation}")
    parameters.nthread = threads
    with _errors(library) as errors:
        if library.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
            raise OSError(f"llama.cpp can't quantise {str(source)!r} to {quantisation}: {_last(errors)}")


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU: a prompt, then one token at a time.

    Parameters
    ----------
    path : Path
        The GGUF file.
    n_ctx : int
        The most tokens that prompt and steps have together.
    threads : int
        At least 1, for the prompt and for the steps.
    cache_type : str
        Of keys and values, one of `CACHE_TYPES`.
    flash_attention : bool, optional
        None leaves it to llama.cpp, which takes it on CPUs, but for f32: its flash attention would round keys and
        values to f16 first. Values in q8_0 need it.

    Attributes
    ----------
    vocabulary : int
        The length of a row of logits.
    seconds : float
        Duration of the last `prefill`, `step` or `logits`, without copying the logits.

    Raises
    ------
    ValueError
        Another type of cache, or no tokens or threads.
    OSError
        llama.cpp can't load the file; the message holds its reason.
    ImportError
        llama-cpp-python is missing; says what to run.
    """

    def __init__(
        self,
        path: Path,
        n_ctx: int,
        threads: int = 2,
        cache_type: str = "f16",
        flash_attention: bool | None = None,
    ) -> None:
        _check_choice("cache type", cache_type, CACHE_TYPES)
        if n_ctx < 1 or threads < 1:
            raise ValueError(f"{n_ctx} tokens of context, {threads} threads: at least 1 of each is needed")
        self._library = library = _library()
        self._model = self._context = None
        self.n_ctx, self.length, self.seconds = n_ctx, 0, 0.0
        library.llama_backend_init()
        with _errors(library) as errors:
            parameters = library.llama_model_default_params()
            parameters.n_gpu_layers = 0
            self._model = library.llama_model_load_from_file(str(path).encode(), parameters)
            if self._model:
                self._context = library.llama_init_from_model(
                    self._model, _context_parameters(library, n_ctx, threads, cache_type, flash_attention)
                )
            if not self._context:
                self.close()
                raise OSError(f"llama.cpp can't load {str(path)!r}: {_last(errors)}")
        self.vocabulary = int(library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model)))
        self._batch = library.llama_batch_init(_BATCH, 0, 1)

    def prefill(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Forget everything and read a prompt.

        Parameters
        ----------
        tokens : array_like
            Integers (length,), length >= 1; a torch tensor on the CPU serves.

        Returns
        -------
        ndarray
            float32 (vocabulary,): logits of what follows the last one.

        Raises
        ------
        ValueError
            No tokens, more than `n_ctx`, or one that the vocabulary doesn't have.
        RuntimeError
            llama.cpp failed, or `close` was called.
        """
        self._clear()
        return self._decode(self._checked(tokens), every=False).reshape(-1)

    def step(self, token: int) -> NDArray[np.float32]:
        """Read one token more; float32 (vocabulary,) logits of what follows it. Raises what `prefill` does."""
        return self._decode(self._checked([token]), every=False).reshape(-1)

    def logits(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Forget everything and read tokens; float32 (length, vocabulary), logits after each of them.

        They differ a little from those of single steps: llama.cpp runs many tokens through other kernels. Takes the
        arguments and raises what `prefill` does.
        """
        self._clear()
        return self._decode(self._checked(tokens), every=True)

    def close(self) -> None:
        """Free the model; may be called twice."""
        if getattr(self, "_batch", None) is not None:
            self._library.llama_batch_free(self._batch)
        with _errors(self._library):
            if self._context:
                self._library.llama_free(self._context)
            if self._model:
                self._library.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _clear(self) -> None:
        if self._context:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self.length = 0

    def _checked(self, tokens: ArrayLike) -> list[int]:
        if not self._context:
            raise RuntimeError("this LlamaCpp was closed: make a new one")
        found: list[int] = np.asarray(tokens).tolist()
        if not found or self.length + len(found) > self.n_ctx:
            raise ValueError(
                f"{len(found)} tokens after {self.length}: at least 1 is needed, and n_ctx leaves room for "
                f"{self.n_ctx - self.length}"
            )
        if outside := [token for token in found if not 0 <= token < self.vocabulary]:
            raise ValueError(f"token {outside[0]}: the vocabulary has 0 to {self.vocabulary - 1}")
        return found

    def _decode(self, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        """Logits of the last token, or of every one."""
        rows = np.empty((len(tokens) if every else 1, self.vocabulary), dtype=np.float32)
        self.seconds = 0.0
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            last = start + len(part) == len(tokens)
            outputs = range(len(part)) if every else [len(part) - 1] * last
            self._fill(part, set(outputs))
            began = time.perf_counter()
            status = self._library.llama_decode(self._context, self._batch)
            # Some back ends still compute after the call has returned.
            self._library.llama_synchronize(self._context)
            self.seconds += time.perf_counter() - began
            if status:
                raise RuntimeError(
                    f"llama.cpp can't decode {len(part)} tokens after {self.length} (status {status})"
                )
            self.length += len(part)
            for index in outputs:
                pointer = self._library.llama_get_logits_ith(self._context, index)
                rows[start + index if every else 0] = np.ctypeslib.as_array(pointer, shape=(self.vocabulary,))
        return rows

    def _fill(self, tokens: Sequence[int], outputs: set[int]) -> None:
        batch: Any = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = self.length + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index in outputs


def _context_parameters(
    library: Any, n_ctx: int, threads: int, cache_type: str, flash_attention: bool | None
) -> Any:
    parameters = library.llama_context_default_params()
    parameters.n_ctx = n_ctx
    parameters.n_batch = parameters.n_ubatch = _BATCH
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.type_k = parameters.type_v = getattr(library, f"GGML_TYPE_{cache_type.upper()}")
    if flash_attention is None and cache_type == "f32":
        flash_attention = False
    if flash_attention is not None:
        parameters.flash_attn_type = int(flash_attention)
    # No token is ever taken back, so a sliding window's layers need to keep no more than the window.
    parameters.swa_full = False
    return parameters


def _library() -> Any:
    """The package's C interface."""
    try:
        # By its name at run time: the package is optional, and has no types.
        return importlib.import_module("llama_cpp")
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # the latter two: its shared library can't be loaded
        raise ImportError(
            f"llama.cpp is needed for this and can't be imported ({error}); run: pip install 'torchlamp[bench]'"
        ) from error


@contextmanager
def _errors(library: Any) -> Iterator[list[str]]:
    """Collect llama.cpp's error messages instead of printing all that it says."""
    errors: list[str] = []

    def collect(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode("utf-8", "replace").strip())

    previous, data = library.llama_log_callback(), ctypes.c_void_p()
    library.llama_log_get(ctypes.byref(previous), ctypes.byref(data))
    callback = library.llama_log_callback(collect)
    library.llama_log_set(callback, None)
    try:
        yield errors
    finally:
        library.llama_log_set(previous, data)


def _last(errors: Sequence[str]) -> str:
    """The first message: what follows it are consequences."""
    return errors[0] if errors else "it says no reason"


def _check_choice(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r}: allowed are {', '.join(allowed)}")
