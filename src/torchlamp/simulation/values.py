"""The site `values`: sums of values weighted by probabilities, in low precision, selected ones recomputed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.kernels.products import products
from torchlamp.kernels.recompute import recompute
from torchlamp.kernels.specification import Accumulation, Grid
from torchlamp.rules.element_tile import ElementTile
from torchlamp.rules.none_all import Nothing
from torchlamp.rules.rule import Rule
from torchlamp.simulation.linear import TINY, innermost, needs, select

_FLOAT32 = Accumulation(Grid())
#: Smaller probabilities count as 0: 7000 keys together lose less than 1e-10 of the mass, and no product comes near the
#: subnormal numbers, where the native kernel would take a path that is hundreds of times slower.
SMALLEST_PROBABILITY = 2.0**-46


@dataclass(frozen=True)
class Values:
    """How an attention call sums its values.

    What follows is the output projection W, o -> W o over all heads together. The change of its output per unit of
    absolute error in number j of head h is the norm c_hj of that column of W, relative to ||W o||, estimated by
    sqrt(sum_hj o_hj^2 c_hj^2).
    """

    accumulator: Accumulator
    rule: Rule
    #: c: float32 (heads, value size), or None: all 1, the relative l2 error of the heads' output.
    next_norms: Tensor | None = None
    #: For random rules, on the CPU; every sample starts from the state it has at the call.
    generator: torch.Generator | None = None
    layer: int = 0


def weighted_sums(probabilities: Tensor, value: Tensor, how: Values) -> tuple[Tensor, Tensor]:
    """Probabilities times values for a tile of one sample.

    Sums run over the keys in their order; a hidden key has probability 0 and leaves the sum as it is. Probabilities
    below `SMALLEST_PROBABILITY` count as 0.

    Parameters
    ----------
    probabilities
        float32 (heads, rows, keys).
    value
        float32 (groups, keys, value size), heads a multiple of groups.
    how
        Accumulator and rule.

    Returns
    -------
    The sums, float32 (heads, rows, value size), and how many of each row were recomputed, int64 (heads, rows).
    """
    heads, rows, keys = probabilities.shape
    groups, _, size = value.shape
    # The queries of a group are stacked, so that values aren't repeated.
    kept = probabilities.masked_fill(probabilities < SMALLEST_PROBABILITY, 0.0)
    stacked = kept.reshape(groups, heads // groups * rows, keys)
    rule = how.rule
    sums, squares = products(stacked, value, how.accumulator.accumulation, squares=needs(rule, "needs_error"))
    counts = torch.zeros(heads, rows, dtype=torch.int64, device=value.device)
    shape = (heads, rows, size)
    if not isinstance(rule, Nothing):
        y = sums.view(shape)
        error = exact = numerator = condition = None
        if squares is not None:
            error = squares.sqrt_().mul_(how.accumulator.format.unit_roundoff / 2).view(1, *shape)
        if needs(rule, "needs_exact"):
            exact = products(stacked, value, _FLOAT32)[0].view(1, *shape)
        if needs(rule, "needs_condition"):
            if innermost(rule).numerator == "cheap":
                bound = stacked.norm(dim=-1, keepdim=True) * value.norm(dim=1, keepdim=True)
            else:
                bound = products(stacked, value.abs(), _FLOAT32)[0]
            numerator = bound.view(1, *shape)
            condition = numerator / y.abs()
        tile = ElementTile(
            scores=y[None],
            visible=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=value.device).expand(1, *shape),
            gain=_gain(y, how.next_norms)[None],
            condition=condition,
            numerator=numerator,
            error=error,
            exact=exact,
            generator=how.generator,
            layer=how.layer,
        )
        chosen = select(rule, tile)[0]
        counts = chosen.sum(dim=-1)
        if bool(counts.any()):
            recompute(sums, stacked, value, chosen.reshape(sums.shape))
    return sums.view(shape), counts


def _gain(y: Tensor, next_norms: Tensor | None) -> Tensor:
    """c_hj / sqrt(sum o^2 c^2) of each entry of y (heads, rows, size)."""
    columns = torch.ones_like(y[:, :1]) if next_norms is None else next_norms[:, None]
    size = (y * columns).square().sum(dim=(0, 2), keepdim=True).sqrt().clamp_min(TINY)
    return (columns / size).expand(y.shape)
