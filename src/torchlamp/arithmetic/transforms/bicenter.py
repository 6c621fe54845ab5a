"""`bicenter`: scores of queries and keys that are both less their means; what a key's scores lack is one number."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.transforms.center import Centred
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Change, Side, Transform


@dataclass(frozen=True)
class Bicenter(Transform):
    """q.k = (q - m).(k - n) + m.(k - n) + q.n with the means m of the queries and n of the keys.

    m.(k - n) is one float32 sum a key, the same for all queries that share it; a softmax doesn't see q.n. Columns of
    weights have no common part worth a sum, so that linear layers take the mean of their inputs alone, as `center`.
    Source: derived, docs/transforms.md 1.
    """

    name = "bicenter"
    summary = "queries and keys less their means, one float32 sum for each key; for linear layers as center"

    def fit(self, left: Moments, right: Moments, side: Side) -> Change:
        """Both means, or that of the left side alone."""
        means = [torch.where(m.isfinite(), m, 0.0) for m in (left.mean.float(), right.mean.float())]
        return Centred(means[0], "left") if side == "left" else BothCentred(*means)

    def operations(self, left: int, right: int, depth: int, *, fitted: bool) -> float:
        """Subtractions and means of both, and a sum for each vector of the right one; as `center` of inputs."""
        return float((left + right) * depth * (1 + fitted) + right * depth)

    def operations_a_sum(self) -> float:
        """An addition."""
        return 1.0


@dataclass(frozen=True, eq=False)
class BothCentred(Change):
    """Both operands less a mean."""

    #: float32 (Gb, K) each: m of the left operand's rows, n of the right operand's columns.
    left_mean: Tensor
    right_mean: Tensor

    def left(self, a: Tensor) -> Tensor:
        """The rows less their mean."""
        return (self._groups(a) - self.left_mean[:, None, :]).reshape(a.shape)

    def right(self, b: Tensor) -> Tensor:
        """The columns less their mean."""
        return b - self.right_mean[:, :, None]

    def row_shift(self, a: Tensor) -> Tensor:
        """a.n of every row, (G, M, 1)."""
        return torch.matmul(self._groups(a), self.right_mean[:, :, None]).reshape(*a.shape[:-1], 1)

    def column_shift(self, b: Tensor) -> Tensor:
        """m.(b - n) of every column, (Gb, 1, N)."""
        return torch.matmul(self.left_mean[:, None, :], self.right(b))

    def moments(self, left: Moments, right: Moments) -> tuple[Moments, Moments]:
        """Less the means."""
        return left.centred(self.left_mean.double()), right.centred(self.right_mean.double())

    def _groups(self, a: Tensor) -> Tensor:
        return a.reshape(self.left_mean.shape[0], -1, a.shape[-1])
