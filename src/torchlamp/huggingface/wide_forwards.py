"""Modules of a bfloat16 or float16 model that compute in float32 on their own weights, without a float32 copy of them.

What a matrix is multiplied by, or looked up in, is widened a slab of rows at a time (`kernels.full_rows`). Vectors
(norms, biases) are widened in place for as long as the model is prepared: they are small.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from torchlamp.huggingface.plain_modules import is_known
from torchlamp.kernels import full_rows
from torchlamp.kernels.full_rows import NARROW


def wide_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward of a linear layer or an embedding, in float32 on its half-precision weight.

    None where the weight is no half-precision matrix: the module's own forward can run.

    Raises
    ------
    TypeError
        A module of another kind, whose formula isn't known.
    """
    if not _has_narrow_matrix(module):
        return None
    kind, weight, bias = type(module), module._parameters.get("weight"), module._parameters.get("bias")
    others = [name for name in _narrow_matrices(module) if name != "weight"]
    if weight is not None and not others:
        if kind is nn.Linear:
            return partial(_linear, weight.detach(), bias)
        if kind is Conv1D:
            return partial(_linear, weight.detach().T, bias)
        if kind is nn.Embedding:
            return partial(_embedding, weight.detach(), None)
        scale = getattr(module, "embed_scale", None)
        if isinstance(module, nn.Embedding) and is_known(kind) and isinstance(scale, Tensor):
            return partial(_embedding, weight.detach(), scale)
    names = ", ".join(_narrow_matrices(module))
    raise TypeError(
        f"{kind.__name__} has half-precision weights ({names}) that can't be widened as they are read: load the model "
        "with dtype=torch.float32"
    )


def narrow_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that own a half-precision matrix. TypeError for one whose formula isn't known."""
    return [module for module in model.modules() if wide_forward(module) is not None]


def _has_narrow_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.dtype in NARROW and p.ndim > 1 for p in module._parameters.values())


def _narrow_matrices(module: nn.Module) -> list[str]:
    owned = module._parameters.items()
    return [name for name, p in owned if p is not None and p.dtype in NARROW and p.ndim > 1]


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return full_rows.linear(x, weight, bias)


def _embedding(weight: Tensor, scale: Tensor | None, ids: Tensor, *_: Any) -> Tensor:
    rows = functional.embedding(ids, weight).float()
    return rows if scale is None else rows * scale.to(torch.float32)
