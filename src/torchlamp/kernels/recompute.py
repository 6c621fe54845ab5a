"""Recomputing chosen entries of a product in float32, by the native or the Triton kernel, or their reference."""

import torch
from torch import Tensor

from torchlamp.kernels.dispatch import NativeKernels, as_native, gpu_for, native_for
from torchlamp.kernels.products import WITHOUT_FLOAT64, operands_fit
from torchlamp.kernels.reference import recompute_reference


def recompute(scores: Tensor, a: Tensor, b: Tensor, mask: Tensor, scaling: float | None = None) -> None:
    """Overwrite the marked entries of `scores` by float32 inner products, in place.

    A marked entry (g, i, j) becomes fma(a_K-1, b_K-1, ... fma(a_1, b_1, fma(a_0, b_0, +0))), times `scaling`
    in float32.

    Parameters
    ----------
    scores
        (G, M, N) float32, any strides.
    a, b
        (G, M, K) and (Gb, K, N) float32, any strides, batch g using b[g // (G // Gb)].
    mask
        (G, M, N) bool, any strides (an expanded view will do).
    scaling
        A factor for the recomputed entries, None for 1.

    Raises
    ------
    ValueError
        When the shapes don't fit.
    TypeError
        When an operand isn't float32 or the mask isn't bool.
    """
    _check(scores, a, b, mask)
    if scores.numel() == 0:
        return
    if scores.device.type in WITHOUT_FLOAT64:
        on_cpu = scores.cpu()
        recompute(on_cpu, a.cpu(), b.cpu(), mask.cpu(), scaling)
        scores.copy_(on_cpu)
        return
    if gpu_for(scores, a, b, mask):
        from torchlamp.kernels.gpu.products import recompute_gpu

        recompute_gpu(scores, a, b, mask, scaling)
        return
    native = native_for(scores, a, b, mask)
    if native is None:
        recompute_reference(scores, a, b, mask, scaling)
    else:
        recompute_native(native, scores, a, b, mask, scaling)


def recompute_native(
    native: NativeKernels, scores: Tensor, a: Tensor, b: Tensor, mask: Tensor, scaling: float | None
) -> None:
    """`recompute` by a native kernel, on CPU tensors."""
    whole = scores.resolve_neg().contiguous()  # the same tensor where nothing is to be gathered
    native.extension.recompute(
        native.instruction_set,
        whole,
        as_native(a, "any"),
        as_native(b, "any"),
        as_native(mask),
        scaling,
        torch.get_num_threads(),
    )
    if whole is not scores:
        scores.copy_(whole)


def _check(scores: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> None:
    if any(t.dtype != torch.float32 for t in (scores, a, b)) or mask.dtype != torch.bool:
        dtypes = ", ".join(str(t.dtype) for t in (scores, a, b, mask))
        raise TypeError(f"recompute takes float32 scores, a, b and a bool mask, got {dtypes}")
    if not operands_fit(a, b) or not scores.shape == mask.shape == (*a.shape[:2], b.shape[2]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (scores, a, b, mask))
        raise ValueError(
            f"scores, a, b and mask of shapes {shapes} don't fit: "
            "they must be (G, M, N), (G, M, K), (Gb, K, N) and (G, M, N) with G a multiple of Gb"
        )
