"""`smooth`: channel scales moved from one operand to the other."""

from dataclasses import dataclass

import torch

from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Change, Diagonal, Side, Transform

#: Scales stay within 2^-20 and 2^20, so that no operand of ordinary size leaves float32's range.
LARGEST_EXPONENT = 20.0


@dataclass(frozen=True)
class Smooth(Transform):
    """a_k b_k = (a_k / s_k) (s_k b_k) with s_k = (E a_k^2 / E b_k^2)^(1/4), rounded to a power of two.

    Both operands then have the same energy in every channel, so that neither alone holds the outliers. Powers of two
    change no bit of a product. Source: SmoothQuant, arXiv 2211.10438, with alpha = 1/2 and root mean squares in the
    place of largest magnitudes; docs/transforms.md 5.
    """

    name = "smooth"
    summary = "channel scales, powers of two, moved so that both operands have equal energies"

    def fit(self, left: Moments, right: Moments, side: Side) -> Change:
        """The scales; 1 where a channel is all zero or not finite."""
        exponents = (left.energy.log2() - right.energy.log2()) / 4
        exponents = torch.where(exponents.isfinite(), exponents, 0.0).clamp(
            -LARGEST_EXPONENT, LARGEST_EXPONENT
        )
        return Diagonal(None, torch.exp2(exponents.round()).float())

    def operations(self, left: int, right: int, depth: int, *, fitted: bool) -> float:
        """A scaling of each number, and the energies."""
        return float((left + right) * depth * (1 + fitted))
