"""The norms of a Jacobian's columns by automatic differentiation: all of f's outputs, or unbiased probes of them.

An error d in component j of y moves f(y) by d J e_j to first order. The look-ahead of a function that isn't known in
closed form is therefore the norm of each column of its Jacobian J (..., outputs of f, inputs of f).

**Exactly**, one backward pass for each output i gives row i of J, and the columns' norms are sums over the rows.

**By probes**, for functions of many outputs. The 1-norm ||J e_j||_1 = sum_i |J_ij| is a sum over rows: s of the m rows,
drawn without replacement, times m / s estimate it without bias, and the spread of the drawn numbers gives its standard
error, with the factor 1 - s / m for what is left to draw. The squared 2-norm is the mean of (J^T v)_j^2 over random
signs v (Hutchinson): the cross terms J_ij J_kj v_i v_k have mean zero. s draws of v estimate it without bias; the norm
is the root of the estimate, and its standard error by the delta method that of the square over twice the norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: From rows (rows, inputs) to rows (rows, anything), each row by itself.
Function = Callable[[Tensor], Tensor]
#: The norm in which an error of f's output is measured.
NormOrder = Literal[1, 2]
#: Outputs of f up to which every one is differentiated unless probes are asked for.
MAX_EXACT = 512
#: Backward passes for functions of more outputs.
PROBES = 64


@dataclass(frozen=True)
class ColumnNorms:
    """||J e_j|| for every component j of the rows that a function is given.

    Attributes
    ----------
    norms : Tensor
        float32 (rows, inputs).
    standard_error : Tensor
        float32 (rows, inputs): of an estimate by probes; zeros where every output was differentiated.
    outputs : Tensor
        float32 (rows, outputs): f of the rows, flattened.
    probes : int
        Backward passes.
    """

    norms: Tensor
    standard_error: Tensor
    outputs: Tensor
    probes: int


def column_norms(
    f: Function,
    y: Tensor,
    order: NormOrder = 1,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> ColumnNorms:
    """The norms of the columns of f's Jacobian at each row of y.

    Parameters
    ----------
    f : callable
        Differentiable, float32 (rows, inputs) to (rows, anything), each row by itself.
    y : Tensor
        float32 (rows, inputs).
    order : int
        1 or 2.
    probes : int, optional
        Backward passes. None: one for each output up to `MAX_EXACT` outputs, else `PROBES`. As many as there are
        outputs, or more, are exact.
    generator : torch.Generator, optional
        On the CPU; of the probes. None: one with the seed 0.

    Raises
    ------
    ValueError
        f gives another number of rows, or no gradient; no probes; another norm.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order!r}: columns are measured in the 1-norm or the 2-norm")
    if probes is not None and probes < 2:
        raise ValueError(f"probes={probes}: give at least 2, from which an error can be estimated")
    with torch.inference_mode(False), torch.enable_grad():
        at = y.detach().clone().requires_grad_()
        out = f(at)
        if out.shape[:1] != y.shape[:1]:
            raise ValueError(
                f"f gives shape {tuple(out.shape)} for {tuple(y.shape)}: it must map each row to a row"
            )
        if not out.requires_grad:
            raise ValueError(
                "f gives no gradient: look-ahead differentiates it, so it must be differentiable"
            )
        flat = out.reshape(len(out), -1)
        count = flat.shape[1]
        passes = (count if count <= MAX_EXACT else PROBES) if probes is None else min(probes, count)
        if passes == count:
            total = torch.zeros_like(at)
            for output in range(count):
                total += _power(_backward(flat, at, _unit(flat, output)), order)
            norms = total if order == 1 else total.sqrt()
            return ColumnNorms(norms.detach(), torch.zeros_like(norms), flat.detach(), passes)
        draws = generator or torch.Generator().manual_seed(0)
        rows = torch.randperm(count, generator=draws)[:passes].tolist()
        first, second = torch.zeros_like(at), torch.zeros_like(at)
        for output in rows:
            if order == 1:
                value = _backward(flat, at, _unit(flat, output)).abs()
            else:
                signs = torch.randint(2, (1, count), generator=draws).to(flat.device) * 2.0 - 1.0
                value = _backward(flat, at, signs.expand(flat.shape)).square()
            first, second = first + value, second + value.square()
    return _estimate(first.detach(), second.detach(), passes, count, order, flat.detach())


def _estimate(
    first: Tensor, second: Tensor, passes: int, count: int, order: NormOrder, outputs: Tensor
) -> ColumnNorms:
    """Mean and standard error from the sums of the drawn values and of their squares."""
    mean = first / passes
    variance = ((second / passes - mean.square()) * (passes / (passes - 1)) / passes).clamp_min(0.0)
    if order == 1:
        error = (variance * (1 - passes / count)).sqrt() * count
        return ColumnNorms(mean * count, error, outputs, passes)
    norms = mean.sqrt()
    error = torch.where(norms > 0, variance.sqrt() / (2 * norms), 0.0)
    return ColumnNorms(norms, error, outputs, passes)


def _unit(flat: Tensor, output: int) -> Tensor:
    weights = torch.zeros_like(flat)
    weights[:, output] = 1.0
    return weights


def _backward(flat: Tensor, at: Tensor, weights: Tensor) -> Tensor:
    """weights^T J, row by row."""
    (row,) = torch.autograd.grad(flat, at, grad_outputs=weights, retain_graph=True)
    return row


def _power(row: Tensor, order: NormOrder) -> Tensor:
    return row.abs() if order == 1 else row.square()
