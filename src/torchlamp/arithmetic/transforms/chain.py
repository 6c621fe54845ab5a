"""Several transforms one after the other, in the order they are written."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.sort import dealt
from torchlamp.arithmetic.transforms.transform import TRANSFORMS, Change, Diagonal, Side, Transform


@dataclass(frozen=True, eq=False)
class Changed:
    """Changed operands, and what their products lack."""

    #: float32 (G, M, K) and (Gb, K, N).
    left: Tensor
    right: Tensor
    #: float32 (G, M, 1): to be added to every product of a row; None: nothing.
    row_shift: Tensor | None = None
    #: float32 (G, 1, N): to be added to every product of a column; None: nothing.
    column_shift: Tensor | None = None


def moments_of(a: Tensor, b: Tensor, transforms: Sequence[Transform]) -> tuple[Moments, Moments]:
    """The statistics that transforms need of operands (G, M, K) and (Gb, K, N)."""
    products = any(transform.needs_products for transform in transforms)
    rows = a.reshape(b.shape[0], -1, a.shape[-1]) if b.shape[0] else a
    return Moments.of(rows, products), Moments.of(b.mT, products)


@torch.no_grad()
def fit(
    transforms: Sequence[Transform], left: Moments, right: Moments, side: Side = "right", promote: int = 0
) -> list[Change]:
    """The changes that statistics of the unchanged operands ask for; each sees the statistics after the one before.

    Sorted terms are dealt out to the pieces of a sum that is promoted after every `promote` terms (0: none is).

    Raises
    ------
    ValueError
        A sum of a length that a transform can't change.
    """
    changes: list[Change] = []
    for transform in transforms:
        transform.check_size(left.total.shape[1])
        change = transform.fit(left, right, side)
        left, right = change.moments(left, right)
        changes.append(change)
    size = left.total.shape[1]
    if 0 < promote < size and TRANSFORMS.get("sort") in transforms:
        order = dealt(size, promote).to(left.total.device)
        changes.append(Diagonal(order.expand(left.total.shape[0], -1)))
    return changes


@torch.no_grad()
def change_operands(changes: Sequence[Change], a: Tensor, b: Tensor) -> Changed:
    """Changed operands: products of these plus the shifts are those of `a` and `b`, exactly in real arithmetic.

    Parameters
    ----------
    changes : sequence of Change
        As `fit` gives them.
    a, b : Tensor
        float32 (G, M, K) and (Gb, K, N), G a multiple of Gb; batch g uses b[g // (G // Gb)].
    """
    rows: Tensor | None = None
    columns: Tensor | None = None
    for change in changes:
        rows = _sum(rows, change.row_shift(a))
        columns = _sum(columns, change.column_shift(b))
        a, b = change.left(a), change.right(b)
    if columns is not None:
        columns = columns.repeat_interleave(a.shape[0] // b.shape[0], dim=0)
    return Changed(a, b, rows, columns)


@torch.no_grad()
def change_rows(changes: Sequence[Change], a: Tensor) -> tuple[Tensor, Tensor | None]:
    """The left operand and what its rows lack, as `change_operands` gives them where the right one is changed already.

    What columns lack, `Change.column_shift` of the right operand, is the caller's to add.
    """
    shift: Tensor | None = None
    for change in changes:
        shift = _sum(shift, change.row_shift(a))
        a = change.left(a)
    return a, shift


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


@torch.no_grad()
def transformed(
    a: Tensor, b: Tensor, transforms: Sequence[Transform], side: Side = "right", promote: int = 0
) -> Changed:
    """Operands changed by transforms that are fitted to these operands themselves; as `change_operands`."""
    if not transforms or 0 in (*a.shape, *b.shape):
        return Changed(a, b)
    return change_operands(fit(transforms, *moments_of(a, b, transforms), side, promote), a, b)
