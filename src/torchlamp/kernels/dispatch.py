"""Which implementation serves a call, native kernel or readable reference, and tensors as a native kernel takes them.

Every room asks here, and nowhere else: `native_for(...)` gives the native kernels that serve the tensors of a call,
or None; `gpu_for(...)` those of a CUDA device, or None; and then the reference runs.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchlamp.kernels import native

logger = logging.getLogger("torchlamp.kernels")

_TAKEN = (torch.float32, torch.bool)


class NativeKernels(NamedTuple):
    """The native kernels of one instruction set: `extension.products(instruction_set, ...)`."""

    instruction_set: str
    extension: Any


def native_for(*tensors: Tensor | None) -> NativeKernels | None:
    """The native kernels that serve a call on these tensors, or None where the reference must.

    Native kernels take float32 numbers and bool masks on the CPU. None among the tensors stands for an optional one
    that isn't there; without any tensor the answer is for this machine.
    """
    instruction_set = native.instruction_set()
    if instruction_set is None:
        return None
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in _TAKEN):
            return None
    return _kernels(instruction_set)


@functools.cache
def _kernels(instruction_set: str) -> NativeKernels:
    return NativeKernels(instruction_set, native.extension())


def as_native(tensor: Tensor, contiguous: Literal["any", "last", "all"] = "last") -> Tensor:
    """A tensor as a native kernel reads it from its memory.

    The result has no gradient and isn't lazily negated, which a pointer doesn't show. Its strides are as they are
    ("any"), the last dimension is contiguous ("last"), or all of it is ("all"). bool becomes uint8. Nothing is copied
    where nothing must be.
    """
    # Asked first: of a short call each operation of torch is a part that shows.
    plain = tensor.detach() if tensor.requires_grad else tensor
    if plain.is_neg():
        plain = plain.resolve_neg()
    if contiguous == "all" or (contiguous == "last" and plain.shape[-1] > 1 and plain.stride(-1) != 1):
        plain = plain.contiguous()
    return plain.view(torch.uint8) if plain.dtype == torch.bool else plain


def gpu_for(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels of `torchlamp.kernels.gpu` serve a call on these tensors.

    They take float32 numbers and bool masks on one CUDA device, where Triton is installed; on the CPU, in Triton's
    interpreter, only where TORCHLAMP_KERNELS=triton and TRITON_INTERPRET=1 ask for it. None among the tensors stands
    for an optional one that isn't there.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    if device.type == "cpu":
        served = native.interprets_triton()
    else:
        served = device.type == "cuda" and native.forced() in ("", "triton") and _has_triton()
    return served and all(tensor.device == device and tensor.dtype in _TAKEN for tensor in given)


@functools.cache
def _has_triton() -> bool:
    """Whether Triton is there; if not, one warning says what it would change."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning(
            "the simulation on this GPU runs in torch, many times slower than by Triton kernels: "
            'pip install "torchlamp[gpu]"'
        )
    return found


class NativeObject:
    """A native object over some tensors: made at first use, and anew for another instruction set.

    A copy of its owner must not share it: `__getstate__` gives the copy a new one.
    """

    def __init__(self) -> None:
        self._made: tuple[str, Any] | None = None

    def get(self, kernels: NativeKernels, make: Callable[[NativeKernels], Any]) -> Any:
        """The object for these kernels; `make` gives it where there is none yet."""
        made = self._made  # read once: other threads may replace it
        if made is None or made[0] != kernels.instruction_set:
            self._made = made = (kernels.instruction_set, make(kernels))
        return made[1]

    def forget(self) -> None:
        """Make the object anew at its next use: the tensors that it was made over have been replaced."""
        self._made = None
