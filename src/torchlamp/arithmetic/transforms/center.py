"""`center`: products with an operand less its mean, whose own products are formed in float32."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Change, Side, Transform


@dataclass(frozen=True)
class Center(Transform):
    """q.k = q.(k - m) + q.m, and x W = (x - m) W + m W: only what differs from the mean goes through the narrow sum.

    A softmax doesn't see q.m, the same number for all keys of a row. Source: derived, docs/transforms.md 1.
    """

    name = "center"
    summary = (
        "less the mean: of the keys for scores, of the inputs for linear layers; its products in float32"
    )

    def fit(self, left: Moments, right: Moments, side: Side) -> Change:
        """The mean of the side."""
        mean = (left if side == "left" else right).mean.float()
        return Centred(torch.where(mean.isfinite(), mean, 0.0), side)

    def operations(self, left: int, right: int, depth: int, *, fitted: bool) -> float:
        """A subtraction for each number of the side, which is the right one where it is no weight, and the mean."""
        return float((right or left) * depth * (1 + fitted))


@dataclass(frozen=True, eq=False)
class Centred(Change):
    """One operand less a mean."""

    #: float32 (Gb, K).
    mean: Tensor
    side: Side

    def left(self, a: Tensor) -> Tensor:
        """The rows less the mean, or as they are."""
        if self.side == "right":
            return a
        groups = a.reshape(self.mean.shape[0], -1, a.shape[-1])
        return (groups - self.mean[:, None, :]).reshape(a.shape)

    def right(self, b: Tensor) -> Tensor:
        """The columns less the mean, or as they are."""
        return b if self.side == "left" else b - self.mean[:, :, None]

    def row_shift(self, a: Tensor) -> Tensor | None:
        """a.m of every row, (G, M, 1), where m is the mean of the right operand's columns."""
        if self.side == "left":
            return None
        groups = a.reshape(self.mean.shape[0], -1, a.shape[-1])
        return torch.matmul(groups, self.mean[:, :, None]).reshape(*a.shape[:-1], 1)

    def column_shift(self, b: Tensor) -> Tensor | None:
        """m.b of every column, (Gb, 1, N), where m is the mean of the left operand's rows."""
        if self.side == "right":
            return None
        return torch.matmul(self.mean[:, None, :], b)

    def moments(self, left: Moments, right: Moments) -> tuple[Moments, Moments]:
        """Less the mean."""
        mean = self.mean.double()
        return (left.centred(mean), right) if self.side == "left" else (left, right.centred(mean))
