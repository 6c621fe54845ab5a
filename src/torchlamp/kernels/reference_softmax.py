"""The softmax of the native attention kernel in torch, bit for bit: its exponential, its tanh, its order of summation.

`native/simd/vector.hpp` and `native/simulation/row_softmax.hpp` say the same in C++. torch's own exponentials and sums
are other ones on every machine, and a narrow sum in the next layer makes steps of its own grid of their last bits.
"""

import math

import torch
from torch import Tensor

from torchlamp.kernels.fma import fma
from torchlamp.kernels.products import products
from torchlamp.kernels.specification import Accumulation, Grid

_FLOAT32 = Accumulation(Grid())
#: Lanes of a sum: number j is added to lane j mod 16.
_LANES = 16
#: Below it the kernel's exponential is 0, which float32 reaches only at -103.97.
_LOWEST = -87.33
_EXPONENTIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_TANGENT = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def exponential(x: Tensor) -> Tensor:
    """e^x of float32 numbers x <= 0, to about a unit in the last place; 0 below -87.33, NaN for NaN.

    Cody and Waite's reduction, x = n ln 2 + r, and a polynomial of degree 6 in r, each step one fused multiply-add.
    """
    bounded = torch.maximum(x, _constant(x, _LOWEST))
    power = torch.round(bounded * _constant(x, math.log2(math.e)))
    rest = fma(-power, _constant(x, 0.693359375), bounded)
    rest = fma(-power, _constant(x, -2.12194440e-4), rest)
    value = _polynomial(rest, _EXPONENTIAL)
    value = fma(value, rest * rest, rest + 1.0)
    scale = ((power.nan_to_num().to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < _constant(x, _LOWEST), 0.0, value * scale)


def tangent(x: Tensor) -> Tensor:
    """Hyperbolic tangents of float32 numbers, to about two units in the last place.

    A polynomial up to 5/8, exponentials beyond.
    """
    size, square = x.abs(), x * x
    near = fma(_polynomial(square, _TANGENT) * square, x, x)
    power = exponential((size * -2.0).clamp(max=0.0))
    far = torch.copysign((1.0 - power) / (1.0 + power), x)
    return torch.where(size < 0.625, near, torch.where(size >= 0.625, far, x))


def lane_sum(x: Tensor, first: int) -> Tensor:
    """Sums (..., 1) of the last dimension, whose numbers have the places first, first + 1, ..., in sixteen lanes.

    Lane i and i + 8 are added, then i + 4, i + 2, i + 1.
    """
    before = first % _LANES
    padded = torch.nn.functional.pad(x, (before, -(before + x.shape[-1]) % _LANES))
    blocks = padded.view(*padded.shape[:-1], -1, _LANES).unbind(-2)
    total = blocks[0].clone()
    for block in blocks[1:]:
        total += block
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half : 2 * half]
    return total


def capped(scores: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits c tanh(score / c) and their derivative, float32 of the scores' shape; without c the scores and None."""
    if softcap is None:
        return scores, None
    inner = tangent(scores / _constant(scores, softcap))
    return inner * _constant(scores, softcap), 1.0 - inner * inner


def softmax(logits: Tensor, hidden: Tensor | None, sinks: Tensor | None, first: int) -> Tensor:
    """Softmax over visible keys and the sink; 0 at hidden keys, and everywhere in rows that see nothing.

    Parameters
    ----------
    logits, hidden, sinks
        float32 (heads, rows, keys), bool (heads or 1, rows, keys) or None, float32 (heads,) or None.
    first
        Number of the first of these keys in the call, which decides its lane.

    Returns
    -------
    float32 (heads, rows, keys).
    """
    shown = logits if hidden is None else logits.masked_fill(hidden, -math.inf)
    top = shown.amax(dim=-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.view(-1, 1, 1))
    weights = exponential(shown - top)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0.0)
    total = lane_sum(weights, first)
    if sinks is not None:
        total = total + exponential(sinks.view(-1, 1, 1) - top)
    weights = weights * (1.0 / total)
    if hidden is not None:
        weights = weights.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
    return weights


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """Sums of values by fused multiply-adds in the order of the keys, float32 (heads, rows, value size).

    `weights` are float32 (heads, rows, keys), `value` (key heads, keys, value size).
    """
    heads, rows, keys = weights.shape
    groups, _, size = value.shape
    stacked = weights.reshape(groups, heads // groups * rows, keys)
    return products(stacked, value, _FLOAT32)[0].reshape(heads, rows, size)


def mean_of_all(value: Tensor) -> Tensor:
    """What a row that sees no key gets, float32 (key heads, value size): the mean, summed in float64 key by key."""
    return (value.double().cumsum(1)[:, -1] / value.shape[1]).float()


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """A polynomial by Horner's rule; the coefficient of the highest power comes first."""
    first, *rest = coefficients
    value = _constant(x, first).expand_as(x)
    for coefficient in rest:
        value = fma(value, x, _constant(x, coefficient))
    return value


def _constant(x: Tensor, value: float) -> Tensor:
    """A float32 number beside x; torch would take a Python number as float64 in some operations."""
    return torch.tensor(value, dtype=torch.float32, device=x.device)
