"""`sort`: the terms of a sum in ascending order of their expected size."""

from dataclasses import dataclass

import torch

from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Change, Diagonal, Side, Transform


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
