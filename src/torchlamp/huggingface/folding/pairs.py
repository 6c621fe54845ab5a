"""Scores under rotary positions: what may be done to the pairs of a head before they are turned.

A rotary position turns the pair (x_i, x_(i + size / 2)) by an angle of its own. What commutes with all turns is a turn
by any other angle and a factor; so these, and nothing else, may be put into the projections of queries and keys
(docs/transforms.md 8).
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
ANGLES = 64
#: How often each pair is turned at most.
SWEEPS = 4


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

    `smooth` gives both elements of a pair one factor. `sort` may exchange them, by a quarter turn, and `balance` turn
    them by any angle: pair after pair takes the angle with the least E sum_k S_k^2, until none gains.

    Parameters
    ----------
    transforms
        Among `smooth`, `balance` and `sort`.
    left, right
        Of queries and keys as the scores multiply them, (key heads, size), with `products`.
    has_norms
        Whether norms with weights that all heads share come between the projections and the turns.

    Raises
    ------
    ValueError
        Statistics without `products`.
    """
    if left.products is None or right.products is None:
        raise ValueError(
            "the calibration's statistics of site scores hold no products of channels: make it with this torchlamp"
        )
    names = {transform.name for transform in transforms}
    queries, keys = (split(x.energy, 1, 2, -1).sum(1) for x in (left, right))
    if has_norms:
        queries, keys = queries.mean(0, keepdim=True), keys.mean(0, keepdim=True)
    cosine, sine, factor = torch.ones_like(keys), torch.zeros_like(keys), torch.ones_like(keys)
    if "smooth" in names:
        exponents = (queries.log2() - keys.log2()) / 4
        exponents = torch.where(exponents.isfinite(), exponents, 0.0)
        factor = torch.exp2(exponents.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).round())
    if "balance" in names:
        angle = torch.arange(ANGLES, dtype=torch.float64, device=keys.device) * (math.pi / ANGLES)
        cosine, sine = _turns(left.second, right.second, angle.cos(), angle.sin(), has_norms)
    elif "sort" in names:
        tried = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64, device=keys.device)
        cosine, sine = _turns(left.second, right.second, tried[0], tried[1], has_norms)
    return PairChange(cosine, sine, factor)


def _turns(
    queries: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor, together: bool
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the turn of every pair, float64 (groups, pairs), for the least E sum_k S_k^2.

    For independent queries and keys E t_i t_j = (E q_i q_j) (E k_i k_j), and so, counted from 0,
    E sum_k S_k^2 = sum_ij (size - max(i, j)) (E q_i q_j) (E k_i k_j).

    Parameters
    ----------
    queries, keys
        Second moments, float64 (groups, size, size).
    cosine, sine
        Of the angles that are tried, (angles,); the first is no turn.
    together
        Whether all groups take the same turn.
    """
    groups, size, _ = queries.shape
    places = torch.arange(size, device=queries.device)
    steps = (size - torch.maximum(places[:, None], places)).double()
    turns = torch.eye(size, dtype=torch.float64, device=queries.device).repeat(groups, 1, 1)
    moments, half = [queries, keys], size // 2
    for _ in range(SWEEPS):
        gained = False
        for pair in range(half):
            at = torch.tensor([pair, pair + half], device=queries.device)
            tried = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
            # Rows of the turned moments, (groups, angles, 2, size), and the pair's own block of them.
            rows = [tried @ m[:, None, at] for m in moments]
            blocks = [row[..., at] @ tried.mT for row in rows]
            others = torch.ones(size, dtype=torch.float64, device=queries.device).index_fill(0, at, 0.0)
            energies = 2 * (rows[0] * rows[1] * (steps[at] * others)).sum((-1, -2))
            energies += (blocks[0] * blocks[1] * steps[at][:, at]).sum((-1, -2))
            if together:
                energies = energies.sum(0, keepdim=True).expand(groups, -1)
            best = energies.argmin(-1)
            gained = gained or bool(
                (energies.gather(1, best[:, None])[:, 0] < energies[:, 0] * (1 - 1e-9)).any()
            )
            for matrix in moments:
                matrix[:, at] = tried[best] @ matrix[:, at]
                matrix[:, :, at] = matrix[:, :, at] @ tried[best].mT
            turns[:, at] = tried[best] @ turns[:, at]
        if not gained:
            break
    pairs = places[:half]
    shared = slice(0, 1) if together else slice(None)
    return turns[shared, pairs, pairs], turns[shared, pairs + half, pairs]
