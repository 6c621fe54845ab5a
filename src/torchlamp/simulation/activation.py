"""Look-ahead through an activation or a gated linear unit, to the next layer's output if its weight is known.

The formulas are derived in docs/sites.md. With h = phi(a), or h = phi(a) b for a GLU, and o = W h with column norms
c_j = ||W e_j||, the relative change of o per unit of absolute error is

    |phi'(a_j)| c_j / ||o||            for an activation,
    |phi'(a_j) b_j| c_j / ||o||        for the gate a of a GLU,
    |phi(a_j)| c_j / ||o||             for its other factor b,

with ||o|| estimated by sqrt(sum_j h_j^2 c_j^2), its root mean square over random signs of the terms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.rules.element_tile import ElementTile
from torchlamp.simulation.linear import TINY, LookAhead, LowPass

#: An elementwise function with a gradient: `torch.relu`, `torch.nn.functional.silu`, an activation module.
Activation = Callable[[Tensor], Tensor]


def derivative(phi: Activation, x: Tensor) -> Tensor:
    """phi'(x), elementwise, by automatic differentiation; the shape of x. Works in inference mode, too."""
    slope: Tensor
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(phi(at).sum(), at)
    return slope


def activated(phi: Activation, next_norms: Tensor | None = None) -> LookAhead:
    """Look ahead from a through h = phi(a).

    Parameters
    ----------
    phi
        The activation.
    next_norms
        ||W e_j|| of the next weight W (next outputs, outputs), float32 (outputs,): `W.norm(dim=0)`. None: the
        activation's output itself is what counts, all norms are 1.
    """
    return _Activated(phi, next_norms)


def gated(phi: Activation, next_norms: Tensor | None = None) -> LookAhead:
    """Look ahead from (a, b) side by side through h = phi(a) b; the parameters as for `activated`."""
    return _Gated(phi, next_norms)


@dataclass(frozen=True)
class _Activated:
    phi: Activation
    next_norms: Tensor | None

    def __call__(self, low: LowPass) -> ElementTile:
        h, slope = self.phi(low.y), derivative(self.phi, low.y).abs_()
        return low.element_tile(_gain(slope, h, self.next_norms), _sensitivity(slope, h))


@dataclass(frozen=True)
class _Gated:
    phi: Activation
    next_norms: Tensor | None

    def __call__(self, low: LowPass) -> ElementTile:
        a, b = low.y.chunk(2, dim=-1)
        value, slope = self.phi(a), derivative(self.phi, a).abs_()
        h = value * b
        gain = torch.cat(
            [_gain(slope * b.abs(), h, self.next_norms), _gain(value.abs(), h, self.next_norms)], -1
        )
        return low.element_tile(gain, torch.cat([_sensitivity(slope, value), 1 / b.abs()], dim=-1))


def _gain(change: Tensor, h: Tensor, next_norms: Tensor | None) -> Tensor:
    """Relative change of the next output: `change` of h_j per unit of error, times c_j / ||o||."""
    columns = torch.ones_like(h[:1]) if next_norms is None else next_norms
    size: Tensor = torch.linalg.vector_norm(h * columns, dim=-1, keepdim=True)
    return change * columns / size.clamp_min(TINY)


def _sensitivity(slope: Tensor, value: Tensor) -> Tensor:
    """|phi'| / |phi|, 0 where the activation is constant: what doesn't react needs no accuracy."""
    return torch.where(slope == 0, 0.0, slope / value.abs())
