"""`compose`: look-ahead mixed precision for any composition f(g(x)), g linear and f differentiable."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchlamp.arithmetic.low_operands import overflow_warning
from torchlamp.policy.policy import SitePolicy
from torchlamp.rules.element_tile import ElementTile
from torchlamp.simulation.convolution import Convolution, convolved, is_convolution
from torchlamp.simulation.jacobian import ColumnNorms, Function, NormOrder, column_norms
from torchlamp.simulation.known_functions import is_elementwise, known_columns
from torchlamp.simulation.linear import TINY, LinearResult, LookAhead, LowPass, linears
from torchlamp.simulation.linear_sums import Weights
from torchlamp.simulation.statistics import Statistics
from torchlamp.simulation.stored_linear import changed_group, stored_linears

#: The site that `compose` counts under: it has the statistics of any linear layer into a function.
SITE = "mlp_up"


def compose(
    g: nn.Module | Tensor,
    f: Function,
    x: Tensor,
    policy: str | SitePolicy,
    *,
    order: NormOrder = 1,
    probes: int | None = None,
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
    observe: Callable[[ColumnNorms], None] | None = None,
) -> Tensor:
    """f(g(x)) with g's sums in low precision and those recomputed that f would amplify.

        >>> layer = torch.nn.Linear(64, 32)
        >>> y = torchlamp.compose(layer, torch.nn.Softmax(-1), torch.randn(5, 64), "ps4+strict:0.1")

    The look-ahead is f's Jacobian J at the low-precision sums: an error d in component j changes f's output by
    |d| ||J e_j|| / ||f||, relative to its norm. For a softmax in the 1-norm this is 2 z (1 - z) |d|, the weight of
    attention's rules. Softmax, log-softmax, LayerNorm, RMSNorm, GLU and elementwise functions of torch are recognised
    (`simulation.known_functions`) and have closed forms. All others are differentiated: one backward pass for each of
    f's outputs up to 512, unbiased probes of them beyond (`simulation.jacobian`).

    Parameters
    ----------
    g : torch.nn.Module or Tensor
        The linear map: a `torch.nn.Linear`, a `torch.nn.Conv1d`, `Conv2d` or `Conv3d` (zero padding), or a weight,
        float32 (outputs, inputs).
    f : callable
        Differentiable, each row by itself: float32 (rows, outputs of g) to (rows, anything); after a convolution
        (samples, channels, ...) to (samples, anything).
    x : Tensor
        float32 (..., inputs); for a convolution (samples, channels, ...).
    policy : str or SitePolicy
        For example ``"ps4+strict:0.1"``, ``"ps4.center.sort+running:0.01"`` or ``"int8+output:0.001"``: the part of a
        policy that follows ``site=``. Rules that need a softmax of their own (`topz`, `mass`, ...) don't fit.
    order : int
        1 or 2: the norm in which a change of f's output is measured.
    probes : int, optional
        Backward passes through f; None chooses as above. Fewer than f's outputs are an estimate, whose standard error
        `observe` sees.
    statistics : Statistics, optional
        Where selected and eligible sums are counted, under the site ``mlp_up`` of layer 0.
    generator : torch.Generator, optional
        On the CPU; needed by random rules.
    observe : callable, optional
        Is handed the `ColumnNorms` of each chunk of rows whose function was differentiated.

    Returns
    -------
    f(g(x)): the shape of x with f's outputs in the place of the inputs; (samples, ...) after a convolution. It has no
    gradient.

    Raises
    ------
    ValueError
        An unknown policy, a rule that needs a softmax of its own, shapes that don't fit, a function without gradient.
    TypeError
        Anything but float32; a module that isn't linear.
    """
    part = SitePolicy.parse(policy)
    part.accumulate.outside_attention()
    if part.rule.looks_through not in ("any", "elementwise"):
        raise ValueError(
            f"rule '{part.rule}' looks through a softmax of its own, and f is any function: use for example "
            "strict, running, bridge, output, condition, random, none or all"
        )
    if is_convolution(g):
        convolution = Convolution(g)
        shape = convolution.output_shape(x)
        ahead = _ahead(lambda y: f(y.view(-1, *shape)), f, order, probes, observe, flat=False)
        result = convolved(x, convolution, part, ahead, generator)
        rows = result.output.view(-1, *shape)
    else:
        ahead = _ahead(f, f, order, probes, observe, flat=True)
        result = _linear(g, x, part, ahead, generator)
        rows = result.output.reshape(-1, result.output.shape[-1])
    if statistics is not None:
        sums = result.selected.numel() * result.eligible
        statistics.record(SITE, 0, int(result.selected.sum()), sums)
        if part.accumulate.register is not None:
            statistics.record_overflow(SITE, 0, result.overflowed, sums)
    elif (
        message := overflow_warning(result.overflowed, result.selected.numel() * result.eligible)
    ) is not None:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    with torch.no_grad():
        out = f(rows)
    return out if is_convolution(g) else out.reshape(*x.shape[:-1], *out.shape[1:])


def _linear(
    g: nn.Module | Tensor, x: Tensor, part: SitePolicy, ahead: LookAhead, generator: torch.Generator | None
) -> LinearResult:
    weights, precision = _weights(g), part.precision
    if precision.is_stored:
        moved, stored = changed_group(x, [weights], precision.transforms, precision.operand, None)
        return stored_linears(moved, stored, rule=part.rule, next_function=ahead, generator=generator)
    return linears(
        x,
        [weights],
        accumulator=precision.sums,
        rule=part.rule,
        next_function=ahead,
        generator=generator,
        operand=precision.operand,
        transforms=precision.transforms,
    )


def _weights(g: nn.Module | Tensor) -> Weights:
    if isinstance(g, Tensor):
        return Weights(g.T)
    if type(g) is nn.Linear:
        return Weights(g.weight.T, g.bias)
    raise TypeError(
        f"g is a {type(g).__name__}: linear maps are torch.nn.Linear, torch.nn.Conv1d, Conv2d, Conv3d, and a weight "
        "(outputs, inputs)"
    )


def _ahead(
    of_rows: Function,
    f: Function,
    order: NormOrder,
    probes: int | None,
    observe: Callable[[ColumnNorms], None] | None,
    flat: bool,
) -> LookAhead:
    """The look-ahead through f, which sees rows (rows, outputs of g) as `of_rows` does."""
    closed = known_columns(f, order)
    # What is known along the last dimension is known of rows, not of channels by places.
    if closed is not None and (flat or is_elementwise(f)):
        return _Known(of_rows, closed, order)
    return _Differentiated(of_rows, order, probes, observe)


def _size(outputs: Tensor, order: NormOrder) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(outputs.flatten(1), ord=order, dim=-1, keepdim=True)
    return size.clamp_min(TINY)


@dataclass(frozen=True)
class _Known:
    """Look ahead through a function whose column norms are known."""

    f: Function
    columns: Callable[[Tensor], Tensor]
    order: NormOrder

    def __call__(self, low: LowPass) -> ElementTile:
        return low.element_tile(self.columns(low.y) / _size(self.f(low.y), self.order))


@dataclass(frozen=True)
class _Differentiated:
    """Look ahead through any differentiable function, row by row."""

    f: Function
    order: NormOrder
    probes: int | None
    observe: Callable[[ColumnNorms], None] | None

    def __call__(self, low: LowPass) -> ElementTile:
        found = column_norms(self.f, low.y, self.order, self.probes)
        if self.observe is not None:
            self.observe(found)
        return low.element_tile(found.norms / _size(found.outputs, self.order))
