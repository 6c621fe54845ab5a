"""Errors of full memory, which Python, torch, safetensors and the system each have their own kind for."""

import errno

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
