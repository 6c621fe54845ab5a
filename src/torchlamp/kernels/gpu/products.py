"""Per-step rounded products and recomputation in Triton; `torchlamp.kernels.reference` is the readable form."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchlamp.kernels.gpu.launch import TILE_COLUMNS, TILE_ROWS, device_of, interpreted, launch_options
from torchlamp.kernels.gpu.rounding import fma, grid_numbers, round_to
from torchlamp.kernels.gpu.sums import form_numbers, tile_sums
from torchlamp.kernels.specification import Accumulation

#: Entries that one program recomputes.
_TOGETHER = 128


def products_gpu(
    a: Tensor,
    b: Tensor,
    accumulation: Accumulation,
    *,
    scaling: float | None = None,
    causal: int | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torchlamp.kernels.products.products`, which documents the arguments, by a Triton kernel."""
    groups, rows, depth = a.shape
    shared, _, columns = b.shape
    out = torch.empty(groups, rows, columns, dtype=torch.float32, device=a.device)
    sums = torch.empty_like(out) if squares else None
    if out.numel() == 0:
        return out, sums
    tiles = (triton.cdiv(columns, TILE_COLUMNS), triton.cdiv(rows, TILE_ROWS), groups)
    a, b = a.detach().resolve_neg(), b.detach().resolve_neg()
    with device_of(a):
        _products[tiles](
            a, *a.stride(), b, *b.stride(), out, sums if sums is not None else out,
            rows, columns, depth, groups // shared, 1.0 if scaling is None else float(scaling), causal or 0,
            GRID=grid_numbers(accumulation.grid), FORM=form_numbers(accumulation),
            RESULT=grid_numbers(accumulation.result),
            SCALED=scaling is not None, CAUSAL=causal is not None, SQUARES=squares,
            INTERPRETED=interpreted(), BM=TILE_ROWS, BN=TILE_COLUMNS, **launch_options(),
        )  # fmt: skip
    return out, sums


def recompute_gpu(scores: Tensor, a: Tensor, b: Tensor, mask: Tensor, scaling: float | None = None) -> None:
    """`torchlamp.kernels.recompute.recompute`, which documents the arguments, by a Triton kernel."""
    marked = mask.nonzero().to(torch.int32).contiguous()
    if len(marked) == 0:
        return
    a, b = a.detach().resolve_neg(), b.detach().resolve_neg()
    values = torch.empty(len(marked), dtype=torch.float32, device=scores.device)
    with device_of(scores):
        _recompute[(triton.cdiv(len(marked), _TOGETHER),)](
            marked, len(marked), values, a, *a.stride(), b, *b.stride(),
            a.shape[2], a.shape[0] // b.shape[0], 1.0 if scaling is None else float(scaling),
            SCALED=scaling is not None, INTERPRETED=interpreted(), BLOCK=_TOGETHER, **launch_options(),
        )  # fmt: skip
    scores[tuple(marked.long().unbind(1))] = values


@triton.jit
def _products(
    a, a_group, a_row, a_k, b, b_group, b_k, b_column, out, squares,
    rows, columns, depth, repeats, scaling, causal,
    GRID: tl.constexpr, FORM: tl.constexpr, RESULT: tl.constexpr,
    SCALED: tl.constexpr, CAUSAL: tl.constexpr, SQUARES: tl.constexpr,
    INTERPRETED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    group = tl.program_id(2).to(tl.int64)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    at = (group * rows + i.to(tl.int64)[:, None]) * columns + j[None, :]
    seen = inside
    last = columns  # columns from here on are hidden from every row of the tile
    if CAUSAL:
        seen = inside & (j[None, :] <= i[:, None] + causal)
        last = tl.minimum(columns, tl.program_id(1) * BM + BM + causal)
    total = tl.zeros((BM, BN), tl.float32)
    sums = tl.zeros((BM, BN), tl.float32)
    if tl.program_id(0) * BN < last:
        total, sums = tile_sums(
            a + group * a_group + i.to(tl.int64) * a_row, a_k, i < rows,
            b + (group // repeats) * b_group + j.to(tl.int64) * b_column, b_k, j < columns,
            depth, GRID, FORM, SQUARES, INTERPRETED,
        )  # fmt: skip
        if SCALED:
            total = round_to(total * scaling, RESULT)
    tl.store(out + at, tl.where(seen, total, 0.0), mask=inside)
    if SQUARES:
        tl.store(squares + at, tl.where(seen, sums, 0.0), mask=inside)


@triton.jit
def _recompute(
    marked, count, values, a, a_group, a_row, a_k, b, b_group, b_k, b_column, depth, repeats, scaling,
    SCALED: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = n < count
    group = tl.load(marked + 3 * n, mask=own, other=0).to(tl.int64)
    i = tl.load(marked + 3 * n + 1, mask=own, other=0).to(tl.int64)
    j = tl.load(marked + 3 * n + 2, mask=own, other=0).to(tl.int64)
    left = a + group * a_group + i * a_row
    right = b + (group // repeats) * b_group + j * b_column
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(depth):
        total = fma(
            tl.load(left + k * a_k, mask=own, other=0.0),
            tl.load(right + k * b_k, mask=own, other=0.0),
            total,
            INTERPRETED,
        )
    if SCALED:
        total = total * scaling
    tl.store(values + n, total, mask=own)
