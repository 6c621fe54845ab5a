"""Scores under rotary positions: what may be done to the pairs of a head before they are turned.

A rotary position turns the pair (x_i, x_(i + size / 2)) by an angle of its own. What commutes with all turns is a turn
by any other angle and a factor; so these, and nothing else, may be put into the projections of queries and keys
(docs/transforms.md 7).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.smooth import LARGEST_EXPONENT
from torchlamp.huggingface.folding.parts import Attention, Gain, Outputs, split

#: Angles that `balance` tries, over half a turn.
ANGLES = 256


@dataclass(frozen=True)
class PairChange:
    """Of every pair (x1, x2): keys become factor (cos x1 - sin x2, sin x1 + cos x2), queries the same by 1 / factor.

    All float64 (groups, pairs); one group where the heads' norms share their weights.
    """

    cosine: Tensor
    sine: Tensor
    #: Powers of two.
    factor: Tensor

    def apply(self, attention: Attention) -> None:
        """Change the projections, and the norms' gains, in place."""
        for side, (part, heads) in enumerate(
            ((attention.query, attention.heads), (attention.key, attention.key_heads))
        ):
            factor = 1 / self.factor if side == 0 else self.factor
            if attention.norms is None:
                self._turn(part, heads, factor)
            else:
                self._turn(part, heads, torch.ones_like(factor))
                self._exchange(attention.norms[side], factor)

    def _turn(self, part: Outputs, heads: int, factor: Tensor) -> None:
        repeats = heads // self.cosine.shape[0]
        cosine, sine, scale = (
            x.repeat_interleave(repeats, 0)[..., None] for x in (self.cosine, self.sine, factor)
        )
        bias = part.bias
        for rows in (part.weight, *(() if bias is None else (bias[:, None],))):
            halves = split(rows, 0, heads, 2, -1)
            first, second = halves[:, 0].double(), halves[:, 1].double()
            halves[:, 0].copy_((cosine * first - sine * second) * scale)
            halves[:, 1].copy_((sine * first + cosine * second) * scale)

    def _exchange(self, gain: Gain, factor: Tensor) -> None:
        """The gain of a norm that is shared by all heads, where pairs keep their places or exchange them."""
        halves = gain.read().double().view(2, -1)
        halves = torch.where(self.sine[0] != 0, halves.flip(0), halves) * factor[0]
        gain.write(halves.flatten().float())


def fit_pairs(transforms: Sequence[Transform], left: Moments, right: Moments, has_norms: bool) -> PairChange:
    """The change of pairs that transforms ask for.

    `smooth` gives both elements one factor. `balance` turns a pair so that the element that is summed first has the
    least energy E q^2 E k^2; `sort` only exchanges the elements, by a quarter turn, where the first has more.

    Parameters
    ----------
    transforms
        Among `smooth`, `balance` and `sort`.
    left, right
        Of queries and keys as the scores multiply them, (key heads, size).
    has_norms
        Whether norms with weights that all heads share come between the projections and the turns.
    """
    names = {transform.name for transform in transforms}
    queries, keys = (split(x.energy, 1, 2, -1) for x in (left, right))
    if has_norms:
        queries, keys = (x.mean(0, keepdim=True) for x in (queries, keys))
    one, zero = torch.ones_like(queries[:, 0]), torch.zeros_like(queries[:, 0])
    factor = one
    if "smooth" in names:
        exponents = (queries.sum(1).log2() - keys.sum(1).log2()) / 4
        exponents = torch.where(exponents.isfinite(), exponents, 0.0)
        factor = torch.exp2(exponents.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).round())
    if "balance" in names:
        angle = _angles(left.second, right.second)
        return PairChange(angle.cos(), angle.sin(), factor)
    if "sort" in names:
        energies = queries * keys
        exchange = energies[:, 0] > energies[:, 1]
        return PairChange(torch.where(exchange, zero, one), torch.where(exchange, -one, zero), factor)
    return PairChange(one, zero, factor)


def _angles(queries: Tensor, keys: Tensor) -> Tensor:
    """The angle (groups, pairs) that leaves the first element the least energy; moments (groups, size, size)."""
    tried = torch.arange(ANGLES, dtype=torch.float64, device=queries.device) * (math.pi / ANGLES)
    cosine, sine = tried.cos(), tried.sin()

    def first(second: Tensor) -> Tensor:
        """E (cos x1 - sin x2)^2 at every angle, (groups, pairs, angles)."""
        pairs = second.shape[-1] // 2
        squares = second.diagonal(dim1=1, dim2=2)
        mixed = second.diagonal(pairs, 1, 2)[..., None]
        one, two = squares[:, :pairs, None], squares[:, pairs:, None]
        return one * cosine.square() - 2 * mixed * cosine * sine + two * sine.square()

    energies = first(queries) * first(keys)
    return tried[torch.where(energies.isfinite(), energies, torch.inf).argmin(-1)]
