"""Per-step rounded products: the native or the Triton kernel where one serves, the reference elsewhere."""

import torch
from torch import Tensor

from torchlamp.kernels.dispatch import NativeKernels, as_native, gpu_for, native_for
from torchlamp.kernels.reference import products_reference
from torchlamp.kernels.specification import Accumulation, accumulation_numbers

#: Devices that can't run the references, which build the fused multiply-add from float64: their tensors go to the
#: CPU and back.
WITHOUT_FLOAT64 = frozenset({"mps"})


def products(
    a: Tensor,
    b: Tensor,
    accumulation: Accumulation,
    *,
    scaling: float | None = None,
    causal: int | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Matrix products whose every step of accumulation is rounded, in the order k = 0, 1, 2, ...

    Parameters
    ----------
    a
        (G, M, K) float32, any strides.
    b
        (Gb, K, N) float32, any strides, G a multiple of Gb: batch g uses b[g // (G // Gb)].
    accumulation
        How the sums are formed.
    scaling
        If given, the finished sums are multiplied by it (as a float32 number, in float32) and rounded again to
        the grid they lie on, `accumulation.result`.
    causal
        If given, entry (i, j) is computed only where j <= i + causal; elsewhere it is 0.
    squares
        Also return, for each entry, the sum of the squares of the accumulator after each of its roundings, by
        float32 FMAs in order and not multiplied by `scaling`: after every step (strict, and within each
        promoted run) or after every block.

    Returns
    -------
    The products (G, M, N), float32, and the sums of squares of the same shape, or None. No gradient flows
    through.

    Raises
    ------
    ValueError
        When the shapes don't fit.
    TypeError
        When an operand isn't float32.
    """
    _check(a, b)
    grouped = accumulation.fuse is not None and accumulation.fuse.group > 1
    device = a.device
    if device.type in WITHOUT_FLOAT64:
        a, b = a.cpu(), b.cpu()
    by_reference = grouped or 0 in (a.shape[0], a.shape[1], b.shape[2])
    if not by_reference and gpu_for(a, b):
        from torchlamp.kernels.gpu.products import products_gpu

        return products_gpu(a, b, accumulation, scaling=scaling, causal=causal, squares=squares)
    native = None if by_reference else native_for(a, b)
    if native is None:
        out, sums = products_reference(a, b, accumulation, scaling=scaling, causal=causal, squares=squares)
    else:
        out, sums = products_native(native, a, b, accumulation, scaling, causal, squares)
    return out.to(device), None if sums is None else sums.to(device)


def products_native(
    native: NativeKernels,
    a: Tensor,
    b: Tensor,
    accumulation: Accumulation,
    scaling: float | None = None,
    causal: int | None = None,
    squares: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`products` by a native kernel, on CPU float32 tensors; into `out` (G, M, N), contiguous, if given."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    result = a.new_empty(shape) if out is None else out
    sums = a.new_empty(shape) if squares else None
    native.extension.products(
        native.instruction_set,
        as_native(a, "any"),
        as_native(b, "any"),
        result,
        sums,
        accumulation_numbers(accumulation),
        scaling,
        causal,
        torch.get_num_threads(),
    )
    return result, sums


def operands_fit(a: Tensor, b: Tensor) -> bool:
    """Whether the shapes are (G, M, K) and (Gb, K, N), G a multiple of Gb."""
    if a.dim() != 3 or b.dim() != 3 or a.shape[2] != b.shape[1]:
        return False
    return a.shape[0] % b.shape[0] == 0 if b.shape[0] else a.shape[0] == 0


def _check(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise TypeError(f"products take float32 operands, got {a.dtype} and {b.dtype}: convert with .float()")
    if not operands_fit(a, b):
        raise ValueError(
            f"operands of shapes {tuple(a.shape)} and {tuple(b.shape)} don't fit: "
            "they must be (G, M, K) and (Gb, K, N) with G a multiple of Gb"
        )
