"""Column norms of Jacobians in closed form, for functions that `compose` recognises: one pass over y, no backward pass.

With z = softmax(y), phi an elementwise function, n the length of a row, t and s the normalised row and its divisor, g
the weight of a norm. In the 1-norm:

    softmax           ||J e_j|| = 2 z_j (1 - z_j)
    log-softmax       ||J e_j|| = |1 - z_j| + (n - 1) z_j
    elementwise       ||J e_j|| = |phi'(y_j)|
    a sigmoid(b)      ||J e_j|| = sigmoid(b_j) for a_j,  |a_j| sigmoid'(b_j) for b_j
    RMSNorm           J_ij = g_i (delta_ij - t_i t_j / n) / s
    LayerNorm         J_ij = g_i (delta_ij - (1 + t_i t_j) / n) / s

The 2-norms of the last two are `simulation.norms.Norm.gain`'s. The derivations are in docs/method.md and
docs/sites.md; tests compare all with automatic differentiation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchlamp.simulation.activation import derivative
from torchlamp.simulation.jacobian import Function, NormOrder
from torchlamp.simulation.norms import Norm

#: Column norms float32 (rows, inputs) of rows float32 (rows, inputs).
Columns = Callable[[Tensor], Tensor]

_SOFTMAX = (torch.softmax, functional.softmax)
_LOG_SOFTMAX = (torch.log_softmax, functional.log_softmax)
#: Functions of single numbers that are known to be so.
ELEMENTWISE: tuple[Any, ...] = (
    torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.sin, torch.cos, functional.relu, functional.gelu,
    functional.silu, functional.softplus, functional.elu, functional.leaky_relu, functional.hardtanh, functional.tanh,
    functional.sigmoid, functional.mish, functional.selu, functional.softsign, functional.logsigmoid,
)  # fmt: skip
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Hardtanh, nn.Mish, nn.SELU,
    nn.Softsign, nn.LogSigmoid, nn.ReLU6, nn.CELU, nn.Identity,
)  # fmt: skip


def known_columns(f: Function, order: NormOrder) -> Columns | None:
    """The closed form of a function's column norms; None: it isn't one of those that are recognised.

    Recognised are torch's functions and modules by identity, with their last dimension where they have one:
    ``torch.nn.Softmax(-1)``, ``functools.partial(torch.softmax, dim=-1)``, ``torch.nn.LayerNorm(n)``,
    ``torch.nn.RMSNorm(n)``, ``torch.nn.GLU()``, ``torch.nn.GELU()``, ``torch.tanh`` and the like. A module with hooks,
    or of a class of its own, isn't.
    """
    if is_elementwise(f):
        return lambda y: derivative(f, y).abs()
    if _is_watched(f):
        return None
    if _along_last(f, _SOFTMAX, nn.Softmax):
        return partial(_softmax, order=order)
    if _along_last(f, _LOG_SOFTMAX, nn.LogSoftmax):
        return partial(_log_softmax, order=order)
    if _along_last(f, (functional.glu,), nn.GLU):
        return _glu
    norm = _norm(f)
    return None if norm is None else partial(_norm_columns, norm=norm, order=order)


def is_elementwise(f: Function) -> bool:
    """Whether f is one of torch's functions of single numbers, on tensors of any shape."""
    if isinstance(f, partial):
        return not f.args and _in(f.func, ELEMENTWISE) and not f.keywords.get("inplace", False)
    in_place = getattr(f, "inplace", False)
    return _in(f, ELEMENTWISE) or (type(f) in ELEMENTWISE_MODULES and not _is_watched(f) and not in_place)


def _is_watched(f: Any) -> bool:
    """Whether a module may do something else than its class says."""
    return isinstance(f, nn.Module) and bool(f._forward_hooks or f._forward_pre_hooks or "forward" in vars(f))


def _in(f: Any, functions: tuple[Any, ...]) -> bool:
    return any(f is known for known in functions)


def _along_last(f: Any, functions: tuple[Any, ...], module: type[nn.Module]) -> bool:
    """Whether f is one of these along the last dimension of rows (rows, inputs)."""
    if type(f) is module:
        return getattr(f, "dim", None) in (-1, 1)
    if isinstance(f, partial) and _in(f.func, functions) and not f.args:
        return f.keywords in ({"dim": -1}, {"dim": 1})
    return _in(f, functions) and functions == (functional.glu,)


def _softmax(y: Tensor, order: NormOrder) -> Tensor:
    z = y.softmax(-1)
    if order == 1:
        return 2 * z * (1 - z)
    # Column j is z_j (e_j - z).
    others: Tensor = z.square().sum(-1, keepdim=True) - z.square()
    return z * ((1 - z).square() + others.clamp_min(0.0)).sqrt()


def _log_softmax(y: Tensor, order: NormOrder) -> Tensor:
    z, others = y.softmax(-1), y.shape[-1] - 1
    # Column j is e_j - z_j (1, 1, ..., 1).
    return (1 - z) + others * z if order == 1 else ((1 - z).square() + others * z.square()).sqrt()


def _glu(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    gate = torch.sigmoid(b)
    return torch.cat([gate, a.abs() * gate * (1 - gate)], dim=-1)


def _norm(f: Any) -> Norm | None:
    """The formula of a torch norm over rows of one dimension."""
    if type(f) not in (nn.LayerNorm, nn.RMSNorm) or len(f.normalized_shape) != 1:
        return None
    (size,) = f.normalized_shape
    weight = torch.ones(size) if f.weight is None else f.weight.detach()
    if type(f) is nn.LayerNorm:
        return Norm("layer", weight, None if f.bias is None else f.bias.detach(), f.eps)
    return Norm("rms", weight, None, torch.finfo(torch.float32).eps if f.eps is None else f.eps)


def _norm_columns(y: Tensor, norm: Norm, order: NormOrder) -> Tensor:
    if order == 2:
        size: Tensor = torch.linalg.vector_norm(norm(y), dim=-1, keepdim=True)
        return norm.gain(y) * size
    n, g = y.shape[-1], norm.weight.abs()
    t, inverse = norm.normalised(y)
    if norm.kind == "rms":
        rest = (g * t.abs()).sum(-1, keepdim=True) - g * t.abs()
        return (g * (1 - t.square() / n).abs() + t.abs() / n * rest) * inverse
    columns = torch.empty_like(y)
    for row in range(len(y)):  # (inputs, inputs) at a time
        cross = (1 + t[row][:, None] * t[row]) / n
        off = (g[:, None] * cross.abs()).sum(0) - g * cross.diagonal().abs()
        columns[row] = off + g * (1 - cross.diagonal()).abs()
    return columns * inverse
