"""The site `values`: sums of values weighted by probabilities, in low precision, selected ones recomputed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.low_operands import (
    LowOperand,
    LowSums,
    left_operand,
    low_products,
    right_operand,
)
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.quantise import quantise
from torchlamp.arithmetic.transforms import TRANSFORMS, Transform
from torchlamp.arithmetic.transforms.sort import dealt
from torchlamp.kernels.products import products
from torchlamp.kernels.recompute import recompute
from torchlamp.kernels.specification import Accumulation, Grid
from torchlamp.rules.element_tile import ElementTile
from torchlamp.rules.none_all import Nothing
from torchlamp.rules.rule import Rule
from torchlamp.simulation.linear import TINY

_FLOAT32 = Accumulation(Grid())
_AS_THEY_ARE = Operand()
#: Smaller probabilities count as 0: 7000 keys together lose less than 1e-10 of the mass, and no product comes near the
#: subnormal numbers, where the native kernel would take a path that is hundreds of times slower.
SMALLEST_PROBABILITY = 2.0**-46
#: Numbers of values put into each row's own order at a time.
_SORTED_ENTRIES = 2**22


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
    #: How probabilities and values enter the sums; groups run along the keys, from the first key of the sample on.
    operand: Operand = _AS_THEY_ARE
    #: `center`: values less a mean, whose product with the row's sum of probabilities is added in float32. `sort`: the
    #: terms of every row in ascending order of its probabilities.
    transforms: tuple[Transform, ...] = ()
    #: What `center` takes off, float32 (key heads, value size); None: the mean of each sample's values.
    mean: Tensor | None = None
    #: The values as they enter the sums of an integer register, (key heads, value size, keys); None: not made yet.
    low: LowOperand | None = None

    def has(self, transform: str) -> bool:
        """Whether the transform of this name is applied."""
        return TRANSFORMS[transform] in self.transforms

    def fitted(self, value: Tensor) -> "Values":
        """The same with the mean and the integers of one sample's values (key heads, keys, value size), if needed."""
        how = self
        if self.has("center") and self.mean is None and value.shape[1]:
            mean = value.mean(1)
            how = replace(self, mean=torch.where(mean.isfinite(), mean, 0.0))
        if self.accumulator.register is None or self.low is not None:
            return how
        return replace(how, low=right_operand(how.centred(value).mT, self.operand, self.accumulator))

    def centred(self, value: Tensor) -> Tensor:
        """Values (key heads, keys, value size) less the mean."""
        return value if self.mean is None or not self.has("center") else value - self.mean[:, None]

    def stored(self, value: Tensor) -> Tensor:
        """The values float32 (key heads, keys, value size) of one sample as they enter the sums, less the mean."""
        if self.low is not None:
            return self.low.values.mT
        return quantise(self.centred(value), self.operand.right, dim=1)


def weighted_sums(
    probabilities: Tensor, value: Tensor, how: Values, low: Tensor | None = None, first: int = 0
) -> tuple[Tensor, Tensor, int]:
    """Probabilities times values for a tile of one sample.

    Sums run over the keys in their order, or with `sort` in ascending order of the row's probabilities (equal ones
    as they are); a hidden key has probability 0 and leaves the sum as it is. Probabilities below `SMALLEST_PROBABILITY`
    count as 0. Recomputed sums have full-precision operands, and the keys in their order. With `center` the product of
    the mean and the row's sum of probabilities is added to the finished sum, which isn't rounded again.

    Tender's operand groups the keys by their largest probability among the rows given, which are a chunk of one head;
    probabilities have no bias and no sign, and each channel of the values one scale. An integer register's sums have
    no order that `sort` could change.

    Parameters
    ----------
    probabilities
        float32 (heads, rows, keys).
    value
        float32 (groups, keys, value size), heads a multiple of groups.
    how
        Accumulator, operand and rule.
    low
        `how.stored` of all values of the sample; None: `value` is all of them, and the tile starts at the first key.
    first
        Number of the tile's first key in the sample.

    Returns
    -------
    The sums, float32 (heads, rows, value size), how many of each row were recomputed, int64 (heads, rows), and how many
    didn't fit an integer register.
    """
    heads, rows, keys = probabilities.shape
    groups, _, size = value.shape
    # The queries of a group are stacked, so that values aren't repeated.
    kept = probabilities.masked_fill(probabilities < SMALLEST_PROBABILITY, 0.0)
    stacked = kept.reshape(groups, heads // groups * rows, keys)
    rule, how, given = how.rule, how.fitted(value), value
    value = how.centred(value)
    entering = (stacked, value)
    left: LowOperand | None = None
    if not how.operand.is_float32:
        low = how.stored(given) if low is None else low
        # Groups start at the sample's first key, whatever the tile.
        padded = pad(kept, (first, 0)).reshape(-1, rows if how.operand.is_tender else 1, first + keys)
        left = left_operand(padded, how.operand, how.accumulator, unsigned=True).stacked(groups)
        entering = (left.values[..., first:], low[:, first : first + keys])
    # Blocks, runs and a unit's groups start there, too: zeros before the tile's first key add nothing to them.
    lead = 0 if how.has("sort") else first % how.accumulator.accumulation.period
    terms = (pad(entering[0], (lead, 0)), pad(entering[1], (0, 0, lead, 0))) if lead else entering
    if left is not None and how.low is not None:
        found = low_products(left, how.low.terms(first + keys), how.accumulator, squares=True)
    else:
        found = LowSums(*_products(terms, how, squares="squares" in rule.byproducts))
    sums, squares = found.sums, found.squares
    overflowed = 0 if found.overflowed is None else int(found.overflowed.sum())
    shift = None
    if how.mean is not None and how.has("center"):
        shift = stacked.sum(-1, keepdim=True) * how.mean[:, None]
    y = sums if shift is None else sums + shift
    counts = torch.zeros(heads, rows, dtype=torch.int64, device=value.device)
    shape = (heads, rows, size)
    if not isinstance(rule, Nothing):
        chosen = rule.select(_tile(stacked, value, entering, y.view(shape), squares, shift, how))[0]
        counts = chosen.sum(dim=-1)
        if bool(counts.any()):
            recompute(sums, stacked, value, chosen.reshape(sums.shape))
            y = sums if shift is None else sums + shift
    return y.view(shape), counts, overflowed


def _products(entering: tuple[Tensor, Tensor], how: Values, squares: bool) -> tuple[Tensor, Tensor | None]:
    """Narrow sums (groups, rows, size) of probabilities (groups, rows, keys) and values (groups, keys, size)."""
    weights, value = entering
    form = how.accumulator.accumulation
    if not how.has("sort"):
        return products(weights, value, form, squares=squares)
    groups, rows, keys = weights.shape
    size = value.shape[-1]
    order = weights.argsort(dim=-1, stable=True)
    order = order.gather(-1, dealt(keys, form.promote).to(order.device).expand_as(order))
    ascending = weights.gather(-1, order)
    sums = weights.new_empty(groups, rows, size)
    found = torch.empty_like(sums) if squares else None
    some = max(1, _SORTED_ENTRIES // max(1, keys * size))
    for group in range(groups):
        for first in range(0, rows, some):
            at = slice(first, min(first + some, rows))
            own = value[group].index_select(0, order[group, at].flatten()).view(-1, keys, size)
            out, running = products(ascending[group, at, None], own, form, squares=squares)
            sums[group, at] = out[:, 0]
            if found is not None and running is not None:
                found[group, at] = running[:, 0]
    return sums, found


def _tile(
    stacked: Tensor,
    value: Tensor,
    entering: tuple[Tensor, Tensor],
    y: Tensor,
    squares: Tensor | None,
    shift: Tensor | None,
    how: Values,
) -> ElementTile:
    """The tile of the sums y (heads, rows, value size); it computes the rest when a rule asks.

    Parameters
    ----------
    stacked, value
        The operands, the values less the mean, (groups, heads / groups * rows, keys) and (groups, keys, value size).
    entering
        The same as they entered the sums.
    y
        The sums, (heads, rows, value size).
    squares
        Sums of the squared partial sums, the shape of the product; None where the rule needs none.
    shift
        What was added to the finished sums, the shape of the product; None: nothing.
    how
        Accumulator and rule.
    """
    shape = (1, *y.shape)

    def with_shift(sums: Tensor, absolute: bool = False) -> Tensor:
        if shift is not None:
            sums = sums + (shift.abs() if absolute else shift)
        return sums.reshape(shape)

    def error(known: Tensor) -> Tensor:
        rounding = known.sqrt().mul_(how.accumulator.unit_roundoff / 2)
        if how.operand.is_float32:
            return rounding.view(shape)
        # What quantisation takes from each term, its signs taken as random.
        of_value = stacked.square() @ (value - entering[1]).square()
        of_weights = (stacked - entering[0]).square() @ value.square()
        return (rounding.square() + of_value + of_weights).sqrt().view(shape)

    def numerator() -> Tensor:
        return with_shift(products(stacked, value.abs(), _FLOAT32)[0], absolute=True)

    def cheap_numerator() -> Tensor:
        bounds: Tensor = stacked.norm(dim=-1, keepdim=True) * value.norm(dim=1, keepdim=True)
        return with_shift(bounds, absolute=True)

    return ElementTile(
        scores=y[None],
        visible=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=value.device).expand(shape),
        gain=_gain(y, how.next_norms)[None],
        condition=lambda: numerator() / y.abs(),
        cheap_condition=lambda: cheap_numerator() / y.abs(),
        numerator=numerator,
        cheap_numerator=cheap_numerator,
        error=None if squares is None else lambda: error(squares),
        exact=lambda: with_shift(products(stacked, value, _FLOAT32)[0]),
        generator=how.generator,
        layer=how.layer,
    )


def _gain(y: Tensor, next_norms: Tensor | None) -> Tensor:
    """c_hj / sqrt(sum o^2 c^2) of each entry of y (heads, rows, size)."""
    columns = torch.ones_like(y[:, :1]) if next_norms is None else next_norms[:, None]
    size = (y * columns).square().sum(dim=(0, 2), keepdim=True).sqrt().clamp_min(TINY)
    return (columns / size).expand(y.shape)
