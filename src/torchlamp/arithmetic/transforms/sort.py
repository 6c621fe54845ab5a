"""`sort`: the terms of a sum in ascending order of their expected size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Change, Diagonal, Side, Transform


def dealt(size: int, promote: int) -> Tensor:
    """Where the terms of a sum go that ascend: int64 (size,), position p takes term number dealt[p].

    A term passes through a rounding for every step that its partial sum goes on for. In one narrow sum, in blocks of
    float32 or not, that falls from the first term to the last, and ascending terms stay as they are. With promotion
    after every `promote` terms it falls within each piece: the largest terms go to the ends of the pieces, the next
    ones in front of them. 0: no promotion. Source: derived, docs/transforms.md 2.
    """
    places = torch.arange(size)
    if not 0 < promote < size:
        return places
    steps = promote - places % promote
    rest = size % promote
    if rest:  # the last piece is shorter
        steps[-rest:] -= promote - rest
    return steps.argsort(descending=True, stable=True).argsort()


@dataclass(frozen=True)
class Sort(Transform):
    """Terms a_k b_k in ascending order of E a_k^2 E b_k^2, so that partial sums stay small until the last steps.

    The rounding error of a narrow sum is about (u / 2) sqrt(sum of its squared partial sums). Source: derived,
    docs/transforms.md 2.
    """

    name = "sort"
    summary = "terms in ascending order of expected energy, so that partial sums stay small"

    def fit(self, left: Moments, right: Moments, side: Side) -> Change:
        """The order of one permutation for each right operand; equal energies stay in their order."""
        energies = left.energy * right.energy
        return Diagonal(torch.where(energies.isfinite(), energies, torch.inf).argsort(dim=1, stable=True))

    def operations(self, left: int, right: int, depth: int, *, fitted: bool) -> float:
        """The energies."""
        return float((left + right) * depth * fitted)
