"""The native extension: is it there, which of its kernels does this machine run, and calls with torch tensors.

The extension is optional. Where it is missing, or the tensors are not on the CPU, the torch twins run instead.
The environment variable TORCHLAMP_KERNELS forces a choice: `avx512`, `avx2`, `portable`, or `torch` for the twins.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from torchlamp.kernels.specification import Accumulation

#: Instruction sets, best first. `portable` is plain C++.
INSTRUCTION_SETS = ("avx512", "avx2", "portable")

#: Keys of a block whose recomputation is counted.
BLOCK_KEYS = 16

_OVERFLOW = {"inf": 0, "nan": 1, "saturate": 2}
#: Lengths beyond any sum reach the kernels as the largest that they can take.
_LONGEST = 2**31 - 1
_WEIGHT = {"strict": 0, "relaxed": 1, "running": 2, "topz": 3}


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The extension module, or None and the reason."""
    try:
        from torchlamp import _native
    except ImportError as error:
        return (
            None,
            f"the native extension is not there ({error}); install torchlamp where a C++20 compiler is",
        )
    return _native, None


@functools.cache
def _choose(forced: str) -> tuple[str | None, str | None]:
    """The instruction set to use for a value of TORCHLAMP_KERNELS, or None and the reason."""
    if forced == "torch":
        return None, "TORCHLAMP_KERNELS=torch asks for the torch twins"
    if forced and forced not in INSTRUCTION_SETS:
        raise ValueError(
            f"TORCHLAMP_KERNELS={forced!r}: allowed are {', '.join(INSTRUCTION_SETS)}, torch, or nothing at all"
        )
    module, reason = _load()
    if module is None:
        return None, reason
    for name in (forced,) if forced else INSTRUCTION_SETS:
        if module.supports(name):
            return name, None
    return None, f"TORCHLAMP_KERNELS={forced}: this machine cannot run these kernels"


def instruction_set() -> str | None:
    """The instruction set of the native kernels that run, or None where the torch twins do."""
    return _choose(os.environ.get("TORCHLAMP_KERNELS", ""))[0]


def available() -> bool:
    """Whether native kernels run on this machine."""
    return instruction_set() is not None


def why_not() -> str | None:
    """Why no native kernel runs, or None if they do."""
    return _choose(os.environ.get("TORCHLAMP_KERNELS", ""))[1]


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


def supports(*tensors: Tensor | None) -> bool:
    """Whether the native kernels can take these tensors: all float32 and on the CPU."""
    return available() and all(
        t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors
    )


def _how(accumulation: Accumulation) -> tuple[int | bool, ...]:
    g = accumulation.grid
    return (
        g.mantissa_bits,
        g.min_exponent,
        g.max_exponent,
        g.top_codes_lost,
        _OVERFLOW[g.overflow],
        g.subnormals,
        g.signed,
        g.negative_zero,
        accumulation.fused,
        min(accumulation.block, _LONGEST),
        min(accumulation.promote, _LONGEST),
    )


def products(
    a: Tensor,
    b: Tensor,
    accumulation: Accumulation,
    scaling: float | None = None,
    causal: int | None = None,
    squares: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`torchlamp.kernels.products.products` on CPU float32 tensors; same arguments, same result, bit for bit."""
    module, _ = _load()
    shape = (a.shape[0], a.shape[1], b.shape[2])
    result = a.new_empty(shape) if out is None else out
    sums = a.new_empty(shape) if squares else None
    module.products(
        instruction_set(),
        _plain(a),
        _plain(b),
        result,
        sums,
        _how(accumulation),
        scaling,
        causal,
        torch.get_num_threads(),
    )
    return result, sums


def recompute(scores: Tensor, a: Tensor, b: Tensor, mask: Tensor, scaling: float | None = None) -> None:
    """`torchlamp.kernels.recompute.recompute` on CPU float32 tensors; same arguments, same result, bit for bit."""
    module, _ = _load()
    whole = scores.resolve_neg().contiguous()  # the same tensor where nothing is to be gathered
    module.recompute(
        instruction_set(),
        whole,
        _plain(a),
        _plain(b),
        _bytes(mask),
        scaling,
        torch.get_num_threads(),
    )
    if whole is not scores:
        scores.copy_(whole)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    accumulation: Accumulation,
    *,
    weight: str,
    threshold: float,
    by_length: bool,
    scaling: float,
    error_scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    blocks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`torchlamp.kernels.attention.fused_attention` on CPU float32 tensors; see there."""
    module, _ = _load()
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1])
    selected = torch.empty(batch, heads, length, dtype=torch.int32)
    visible = torch.empty(batch, length, 2, dtype=torch.int32)
    noted = None
    if blocks:
        noted = torch.zeros(batch, heads, length, -(-key.shape[2] // BLOCK_KEYS), dtype=torch.uint8)
    module.attention(
        instruction_set(),
        *(t if t.stride(-1) == 1 else t.contiguous() for t in map(_plain, (query, key, value))),
        output,
        selected,
        visible,
        noted,
        None if mask is None else _bytes(mask),
        None if sinks is None else _plain(sinks).contiguous(),
        causal,
        scaling,
        softcap or 0.0,
        _WEIGHT[weight],
        threshold,
        by_length,
        error_scale,
        _how(accumulation),
        torch.get_num_threads(),
    )
    return output, selected, visible, noted


def _plain(tensor: Tensor) -> Tensor:
    """The tensor as its memory says: without a gradient, and not lazily negated, which a pointer doesn't show."""
    return tensor.detach().resolve_neg()


def _bytes(mask: Tensor) -> Tensor:
    """A boolean mask as bytes, its last dimension contiguous."""
    mask = mask if mask.stride(-1) == 1 or mask.shape[-1] <= 1 else mask.contiguous()
    return mask.view(torch.uint8)
