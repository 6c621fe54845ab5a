"""The native extension: whether it is there, and which of its kernels this machine runs.

The extension is optional; without it the references run, in torch. The environment variable TORCHLAMP_KERNELS forces
a choice: `avx512_vnni`, `avx512`, `avx2`, `portable`, or `torch` for the references; with `triton` the kernels of
`torchlamp.kernels.gpu` run on a CPU, too, in Triton's interpreter (TRITON_INTERPRET=1), and the references where there
is none. `torchlamp.kernels.dispatch` chooses for a call.
"""

import functools
import logging
import os
from typing import Any

logger = logging.getLogger("torchlamp.kernels")

#: Instruction sets, best first. `portable` is plain C++.
INSTRUCTION_SETS = ("avx512_vnni", "avx512", "avx2", "portable")


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The extension module, or None and the reason."""
    try:
        from torchlamp import _native
    except ImportError as error:
        return (
            None,
            f"the native extension is not there ({error}); install a C++20 compiler (GCC 11+ or Clang 14+; on Debian "
            "apt-get install g++) and run pip install --force-reinstall --no-deps torchlamp",
        )
    return _native, None


@functools.cache
def _choose(forced: str) -> tuple[str | None, str | None]:
    """The instruction set to use for a value of TORCHLAMP_KERNELS, or None and the reason."""
    if forced == "torch":
        return None, "TORCHLAMP_KERNELS=torch asks for the references in torch"
    if forced == "triton":
        return None, "TORCHLAMP_KERNELS=triton asks for the kernels in Triton and the references in torch"
    if forced and forced not in INSTRUCTION_SETS:
        allowed = ", ".join(INSTRUCTION_SETS)
        raise ValueError(
            f"TORCHLAMP_KERNELS={forced!r}: allowed are {allowed}, torch, triton, or nothing at all"
        )
    module, reason = _load()
    if module is None:
        return None, reason
    for name in (forced,) if forced else INSTRUCTION_SETS:
        if module.supports(name):
            return name, None
    return None, f"TORCHLAMP_KERNELS={forced}: this machine cannot run these kernels"


def forced() -> str:
    """What TORCHLAMP_KERNELS asks for; empty if nothing."""
    return os.environ.get("TORCHLAMP_KERNELS", "")


def interprets_triton() -> bool:
    """Whether the kernels in Triton run on the CPU, in its interpreter."""
    return forced() == "triton" and os.environ.get("TRITON_INTERPRET", "") == "1"


def instruction_set() -> str | None:
    """The instruction set of the native kernels that run, or None where the references do."""
    return _choose(forced())[0]


def available() -> bool:
    """Whether native kernels run on this machine."""
    return instruction_set() is not None


def why_not() -> str | None:
    """Why no native kernel runs, or None if they do."""
    return _choose(forced())[1]


def warn_if_absent(what: str) -> None:
    """Say once for each reason that something runs in torch, many times slower, and what to install."""
    if (reason := why_not()) is not None:
        _warn(what, reason)


@functools.cache
def _warn(what: str, reason: str) -> None:
    logger.warning("%s runs in torch, many times slower than by native kernels: %s", what, reason)


def extension() -> Any:
    """The extension module; to be asked for where `available()` says so."""
    return _load()[0]


def features() -> dict[str, str]:
    """For every instruction set: `in use`, `available`, or why it cannot run."""
    module, reason = _load()
    if module is None:
        return dict.fromkeys(INSTRUCTION_SETS, str(reason))
    used = instruction_set()
    return {
        name: "in use" if name == used else "available" if module.supports(name) else "not on this processor"
        for name in INSTRUCTION_SETS
    }
