"""The base of all transforms: from the statistics of a product's operands to an exact change of both."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from torchlamp.arithmetic.transforms.moments import Moments

#: Which operand `center` takes the mean from: the left one's over its rows, or the right one's over its columns.
Side = Literal["left", "right"]


class Change(ABC):
    """What a transform does to the operands of (G, M, K) x (Gb, K, N), G a multiple of Gb.

    Products of the changed operands, plus `row_shift` and `column_shift`, are those of the operands as they were,
    exactly in real arithmetic. Batch g of the left operand belongs to batch g // (G // Gb) of the right one.
    """

    @abstractmethod
    def left(self, a: Tensor) -> Tensor:
        """The changed left operand, float32 (G, M, K)."""

    @abstractmethod
    def right(self, b: Tensor) -> Tensor:
        """The changed right operand, float32 (Gb, K, N)."""

    def row_shift(self, a: Tensor) -> Tensor | None:
        """Float32 (G, M, 1), to add to all finished products of a row of `a`, the operand before this change."""
        return None

    def column_shift(self, b: Tensor) -> Tensor | None:
        """Float32 (Gb, 1, N), to add to all finished products of a column of `b`, the operand before this change."""
        return None

    @abstractmethod
    def moments(self, left: Moments, right: Moments) -> tuple[Moments, Moments]:
        """The statistics of the changed operands, from those before."""


class Transform(ABC):
    """An exact change of the operands of a product before they are rounded or summed.

    A transform is a frozen dataclass without fields and a line in the registry; its spelling is its name.
    """

    name: ClassVar[str]
    #: One line for lists of transforms.
    summary: ClassVar[str]
    #: Whether `fit` needs the second moments between different elements of the sum, K x K of them.
    needs_products: ClassVar[bool] = False

    @abstractmethod
    def fit(self, left: Moments, right: Moments, side: Side) -> Change:
        """The change that these statistics ask for.

        Parameters
        ----------
        left, right : Moments
            Of the two operands, (Gb, K) each: the left one's rows of all batches that share a right one together.
        side : str
            The operand that `center` takes its mean from.
        """

    def operations(self, left: int, right: int, depth: int, *, fitted: bool) -> float:
        """Float32 operations of the change: multiply-adds, additions, scalings; a new order costs none.

        Parameters
        ----------
        left, right : int
            How many vectors of each operand are changed; 0 for weights, which are changed once.
        depth : int
            Terms of a sum.
        fitted : bool
            Whether its statistics are formed for the product, too; False: they were calibrated.
        """
        return 0.0

    def operations_a_sum(self) -> float:
        """Float32 operations for every finished sum."""
        return 0.0

    @staticmethod
    def parse(spelling: "str | Transform") -> "Transform":
        """The transform of that name; a `Transform` is returned as it is.

        Raises
        ------
        ValueError
            An unknown name, with those that there are and the nearest.
        TypeError
            Anything but a string or a transform.
        """
        if isinstance(spelling, Transform):
            return spelling
        if not isinstance(spelling, str):
            raise TypeError(
                f"a transform is a name like 'center', got {type(spelling).__name__} {spelling!r}"
            )
        name = spelling.strip().lower()
        if name not in TRANSFORMS:
            near = difflib.get_close_matches(name, TRANSFORMS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown transform {spelling!r}: {hint}the transforms are {', '.join(TRANSFORMS)}"
            )
        return TRANSFORMS[name]

    def check_size(self, size: int) -> None:
        """Refuse sums of a length that the transform can't change (ValueError)."""
        return

    def __str__(self) -> str:
        return self.name


#: Every transform by its name; the package's `__init__` fills it.
TRANSFORMS: dict[str, Transform] = {}


def in_order(transforms: Iterable[str | Transform]) -> list[Transform]:
    """Transforms or their names in the order of the registry, in which they are applied."""
    order = list(TRANSFORMS)
    return sorted(
        map(Transform.parse, transforms), key=lambda t: order.index(t.name) if t.name in order else len(order)
    )


@dataclass(frozen=True, eq=False)
class Diagonal(Change):
    """Both operands permuted alike, and the left one divided by powers of two that multiply the right one."""

    #: int64 (Gb, K): element k of the changed sum is element order[k]; None: the order stays.
    order: Tensor | None
    #: float32 (Gb, K), powers of two; None: 1 everywhere.
    scales: Tensor | None = None

    def left(self, a: Tensor) -> Tensor:
        """Permuted and divided."""
        groups = a.reshape(self._groups(), -1, a.shape[-1])
        if self.order is not None:
            groups = _take(groups, self.order[:, None, :], -1)
        if self.scales is not None:
            groups = groups / self.scales[:, None, :]
        return groups.reshape(a.shape)

    def right(self, b: Tensor) -> Tensor:
        """Permuted and multiplied."""
        if self.order is not None:
            b = _take(b, self.order[:, :, None], -2)
        return b if self.scales is None else b * self.scales[:, :, None]

    def moments(self, left: Moments, right: Moments) -> tuple[Moments, Moments]:
        """Permuted and scaled."""
        factors = None if self.scales is None else self.scales.double()
        inverse = None if factors is None else 1 / factors
        return left.diagonal(self.order, inverse), right.diagonal(self.order, factors)

    def _groups(self) -> int:
        known = self.order if self.order is not None else self.scales
        assert known is not None
        return known.shape[0]


def _take(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Elements of `x` in an order (Gb, ...) that is shared along the dimensions of size 1."""
    if x.shape[0] == 1:
        return x.index_select(dim, order.flatten())
    if dim == -1:
        return torch.stack([part.index_select(-1, own.flatten()) for part, own in zip(x, order, strict=True)])
    return torch.stack([part.index_select(0, own.flatten()) for part, own in zip(x, order, strict=True)])


@dataclass(frozen=True, eq=False)
class Mapped(Change):
    """q.k = (M^-T q).(M k): both operands mapped, each by its own matrix."""

    #: float64 (Gb, K, K): M^-1, by which rows of the left operand are multiplied from the right.
    inverse: Tensor
    #: float64 (Gb, K, K): M.
    matrix: Tensor

    def left(self, a: Tensor) -> Tensor:
        """M^-T q of every row, formed in float64."""
        groups = a.reshape(self.matrix.shape[0], -1, a.shape[-1]).double()
        return (groups @ self.inverse).float().reshape(a.shape)

    def right(self, b: Tensor) -> Tensor:
        """M k of every column, formed in float64."""
        return (self.matrix @ b.double()).float()

    def moments(self, left: Moments, right: Moments) -> tuple[Moments, Moments]:
        """Mapped."""
        return left.mapped(self.inverse.mT), right.mapped(self.matrix)
