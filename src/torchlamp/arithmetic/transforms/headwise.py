"""`headwise`: transforms of scores are fitted to each query head by itself, which then has keys of its own."""

from dataclasses import dataclass

from torch import Tensor

from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Change, Side, Transform


@dataclass(frozen=True)
class Headwise(Transform):
    """Query heads that share keys each change these in their own way: means, scales, basis and order of one head.

    Elsewhere every product has a representative of its own, and nothing changes. Source: derived, docs/transforms.md 1.
    """

    name = "headwise"
    summary = (
        "other transforms of scores for each query head by itself, which then has its own copy of the keys"
    )

    def fit(self, left: Moments, right: Moments, side: Side) -> Change:
        """No change: whose statistics the others are fitted to is the caller's."""
        return Unchanged()


class Unchanged(Change):
    """Both operands as they are."""

    def left(self, a: Tensor) -> Tensor:
        """As it is."""
        return a

    def right(self, b: Tensor) -> Tensor:
        """As it is."""
        return b

    def moments(self, left: Moments, right: Moments) -> tuple[Moments, Moments]:
        """As they are."""
        return left, right


def own_keys(query: Tensor, key: Tensor) -> Tensor:
    """Keys (batch, heads, keys, size) of each of the heads of queries (batch, heads, queries, size)."""
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
