"""`compose`: look-ahead mixed precision for any composition f(g(x)), g linear and f differentiable."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchlamp.policy.policy import SitePolicy
from torchlamp.rules.element_tile import ElementTile
from torchlamp.simulation.linear import TINY, LowPass, Weights, linears
from torchlamp.simulation.statistics import Statistics
from torchlamp.simulation.stored_linear import changed_group, stored_linears

#: From rows (rows, outputs of g) to rows (rows, anything), row by row.
Function = Callable[[Tensor], Tensor]


def compose(
    g: nn.Linear | Tensor,
    f: Function,
    x: Tensor,
    policy: str | SitePolicy,
    *,
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """f(g(x)) with g's sums in low precision and those recomputed that f would amplify.

        >>> layer = torch.nn.Linear(64, 32)
        >>> y = torchlamp.compose(layer, lambda y: y.softmax(-1), torch.randn(5, 64), "ps4+strict:0.1")

    The look-ahead is f's Jacobian J at the low-precision sums, by automatic differentiation: an error d in component j
    changes f's output by |d| ||J e_j||_1 / ||f||_1 relative to its 1-norm. For a softmax this is 2 z (1 - z) |d|, the
    weight of attention's rules. It costs one backward pass through f for each of f's outputs.

    Parameters
    ----------
    g : torch.nn.Linear or Tensor
        The linear map, or its weight, float32 (outputs, inputs).
    f : callable
        Differentiable, float32 (rows, outputs) to (rows, anything), each row by itself.
    x : Tensor
        float32 (..., inputs).
    policy : str or SitePolicy
        For example ``"ps4+strict:0.1"``, ``"ps4.center.sort+running:0.01"`` or ``"int8+output:0.001"``: the part of a
        policy that follows ``site=``. Rules that need a softmax of their own (`topz`, `mass`, ...) don't fit.
    statistics : Statistics, optional
        Where selected and eligible sums are counted, under the site ``mlp_up`` of layer 0.
    generator : torch.Generator, optional
        On the CPU; needed by random rules.

    Returns
    -------
    f(g(x)), the shape of x with f's outputs in the place of the inputs. No gradient.

    Raises
    ------
    ValueError
        An unknown policy, a rule that needs a softmax of its own, shapes that don't fit.
    TypeError
        Anything but float32.
    """
    part = SitePolicy.parse(policy)
    if part.rule.looks_through not in ("any", "elementwise"):
        raise ValueError(
            f"rule '{part.rule}' looks through a softmax of its own, and f is any function: use for example "
            "strict, running, bridge, output, condition, random, none or all"
        )
    weights = Weights(g.weight.T, g.bias) if isinstance(g, nn.Linear) else Weights(g.T)
    precision, ahead = part.precision, _Jacobian(f)
    if precision.is_stored:
        moved, stored = changed_group(x, [weights], precision.transforms, precision.operand, None)
        result = stored_linears(moved, stored, rule=part.rule, next_function=ahead, generator=generator)
    else:
        result = linears(
            x,
            [weights],
            accumulator=precision.sums,
            rule=part.rule,
            next_function=ahead,
            generator=generator,
            operand=precision.operand,
            transforms=precision.transforms,
        )
    if statistics is not None:
        selected = int(result.selected.sum())
        statistics.record("mlp_up", 0, selected, result.selected.numel() * result.eligible)
    y = result.output
    with torch.no_grad():
        out = f(y.reshape(-1, y.shape[-1]))
    return out.reshape(*y.shape[:-1], *out.shape[1:])


@dataclass(frozen=True)
class _Jacobian:
    """Look ahead through any differentiable function, row by row."""

    f: Function

    def __call__(self, low: LowPass) -> ElementTile:
        with torch.inference_mode(False), torch.enable_grad():
            at = low.y.detach().clone().requires_grad_()
            out = self.f(at).flatten(1)
            columns = torch.zeros_like(at)
            for output in range(out.shape[1]):
                (row,) = torch.autograd.grad(out[:, output].sum(), at, retain_graph=True)
                columns += row.abs()
        size = out.detach().abs().sum(-1, keepdim=True).clamp_min(TINY)
        return low.element_tile(columns.detach() / size)
