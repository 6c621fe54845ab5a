"""The readable references of the native kernels, in torch: the definition, and the way without a compiler.

The order is always k = 0, 1, 2, ... and every operation is elementwise and exactly rounded, so that results
depend neither on how rows are gathered into slabs nor on threads, batch size or device.
"""

import torch
from torch import Tensor

from torchlamp.kernels.fma import fma
from torchlamp.kernels.reference_units import unit_chain
from torchlamp.kernels.rounding import round_to_grid
from torchlamp.kernels.specification import Accumulation, Fuse, Grid

#: Entries of the result worked on at a time: on a CPU the intermediate tensors should stay in its cache,
#: elsewhere each operation should be worth its launch.
_SLAB_ENTRIES_CPU = 2**16
_SLAB_ENTRIES_ELSEWHERE = 2**22
_FLOAT32 = Grid()


@torch.no_grad()
def products_reference(
    a: Tensor,
    b: Tensor,
    accumulation: Accumulation,
    *,
    scaling: float | None = None,
    causal: int | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The reference of `torchlamp.kernels.products.products`, which documents the arguments."""
    groups, rows, depth = a.shape
    shared, _, columns = b.shape
    shape = (groups, rows, columns)
    out = torch.zeros(shape, dtype=torch.float32, device=a.device)
    sums = torch.zeros_like(out) if squares else None
    if out.numel() == 0:
        return out, sums

    # Groups as (shared, group within), so that the shared operand broadcasts instead of being copied.
    grouped = (shared, groups // shared, rows)
    left = a.double().reshape(*grouped, depth, 1)
    right = b.double()[:, None, None]
    out_grouped = out.view(*grouped, columns)
    sums_grouped = None if sums is None else sums.view(*grouped, columns)
    slab = max(1, _slab_entries(a) // (groups * columns))
    for first in range(0, rows, slab):
        last = min(first + slab, rows)
        visible = columns if causal is None else min(columns, last + causal)
        if visible <= 0:
            continue
        here = _Sums(left[:, :, first:last], right[..., :visible], accumulation, squares)
        out_grouped[:, :, first:last, :visible] = here.result(scaling)
        if sums_grouped is not None and here.squares is not None:
            sums_grouped[:, :, first:last, :visible] = here.squares
    if causal is not None:
        for tensor in (out, sums):
            if tensor is not None:
                tensor.tril_(causal)
    return out, sums


@torch.no_grad()
def recompute_reference(
    scores: Tensor, a: Tensor, b: Tensor, mask: Tensor, scaling: float | None = None
) -> None:
    """The reference of `torchlamp.kernels.recompute.recompute`, which documents the arguments."""
    repeats = a.shape[0] // max(1, b.shape[0])
    marked = mask.nonzero()
    slab = max(1, _slab_entries(a) // max(1, a.shape[2]))
    for first in range(0, len(marked), slab):
        g, i, j = marked[first : first + slab].unbind(1)
        left = a[g, i].double().T.contiguous()
        right = b[g // repeats, :, j].double().T.contiguous()
        total = torch.zeros(len(g), dtype=torch.float32, device=a.device)
        for k in range(a.shape[2]):
            total = fma(left[k], right[k], total)
        scores[g, i, j] = total if scaling is None else total * _as_float32(scaling, total)


class _Sums:
    """The sums of one slab: `left` (..., rows, K, 1) times `right` (..., 1, K, columns), in float64."""

    def __init__(self, left: Tensor, right: Tensor, accumulation: Accumulation, squares: bool) -> None:
        self.left, self.right, self.accumulation = left, right, accumulation
        self.squares = self._zero() if squares else None

    def result(self, scaling: float | None) -> Tensor:
        total = self._sum()
        if scaling is None:
            return total
        return round_to_grid(total * _as_float32(scaling, total), self.accumulation.result)

    def _sum(self) -> Tensor:
        form, depth = self.accumulation, self.left.shape[-2]
        if form.fuse is not None:
            return self._unit_sum(form.grid, form.fuse, depth)
        if form.promote == 0 and form.block == 1:
            return self._chain(0, depth, form.grid, note=True)
        length = form.promote or form.block
        inner, outer = (form.grid, _FLOAT32) if form.promote else (_FLOAT32, form.grid)
        total = self._zero()
        for start in range(0, depth, length):
            partial = self._chain(start, min(start + length, depth), inner, note=form.promote > 0)
            total = round_to_grid(total + partial, outer)
            if form.block > 1:
                self._note(total)
        return total

    def _unit_sum(self, grid: Grid, fuse: Fuse, depth: int) -> Tensor:
        """Sums of a matrix unit, those of each promoted run added to a float32 total."""
        length = self.accumulation.promote or depth
        total = self._zero()
        for start in range(0, depth, max(1, length)):
            steps = unit_chain(self.left, self.right, grid, fuse, start, min(start + length, depth))
            for step in steps:
                self._note(step)
            total = total + steps[-1] if self.accumulation.promote else steps[-1]
        return total

    def _chain(self, start: int, stop: int, grid: Grid, note: bool) -> Tensor:
        """Strict sum over k = start..stop-1 from zero: acc <- round(acc + a_k b_k)."""
        acc = self._zero()
        for k in range(start, stop):
            left, right = self.left[..., k, :], self.right[..., k, :]
            acc = fma(left, right, acc) if self.accumulation.fused else acc + (left * right).float()
            acc = round_to_grid(acc, grid)
            if note:
                self._note(acc)
        return acc

    def _note(self, acc: Tensor) -> None:
        if self.squares is not None:
            self.squares = fma(acc, acc, self.squares)

    def _zero(self) -> Tensor:
        shape = (*self.left.shape[:3], self.right.shape[-1])
        return torch.zeros(shape, dtype=torch.float32, device=self.left.device)


def _as_float32(value: float, like: Tensor) -> Tensor:
    """The scalar as a float32 tensor: torch may multiply by a Python float in float64."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _slab_entries(like: Tensor) -> int:
    return _SLAB_ENTRIES_CPU if like.device.type == "cpu" else _SLAB_ENTRIES_ELSEWHERE
