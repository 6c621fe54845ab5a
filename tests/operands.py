"""Operands for the kernels' tests, and the comparison of bits."""

import torch

from torchlamp.kernels import native

#: The native instruction sets that this machine runs.
NATIVE = [name for name, state in native.features().items() if state in ("in use", "available")]
#: Every kind of format: PS(mu), the IEEE ones, finite ones with NaN, saturating, flushing, unsigned, odd
#: widths.
# fmt: off
FORMATS = [
    "ps1", "ps4", "ps7", "ps10", "ps21", "ps22", "ps23", "bf16", "tf32", "fp16", "e4m3fn", "e4m3fn-sat",
    "e4m3fn-flush", "e5m2", "e5m2-sat-flush", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "e2m1fn", "e3m2fn",
    "e3m4", "ue5m3", "e8m1", "e6m21", "e7m22", "e7m23", "ps4-flush", "ps4-sat",
]
FORMS = [
    "", "/unfused", "/block3", "/block32", "/unfused/block5", "/promote4", "/unfused/promote7",
    "/promote1",
]
# fmt: on
KINDS = ["gaussian", "small", "wide", "extreme", "special"]


def draw(kind, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "gaussian":
        return normal
    if kind == "small":
        return torch.randint(-3, 4, shape, generator=generator) * 2.0**-4
    if kind == "wide":
        return normal * torch.exp2(torch.randint(-20, 21, shape, generator=generator).float())
    patterns = torch.randint(-(2**31), 2**31, shape, generator=generator)
    patterns = patterns.to(torch.int32).view(torch.float32)
    if kind == "extreme":
        # any exponent, so that products overflow and underflow, but few infinities of the start
        return torch.where(patterns.isfinite(), patterns, normal)
    values = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 1e-40, -1e-45, 3.4e38, 0.3]
    )
    chosen = values[torch.randint(len(values), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.25, chosen, normal)


def same_bits(got, want):
    """Equal bit for bit, any NaN being equal to any other."""
    assert got.dtype == want.dtype == torch.float32
    assert got.shape == want.shape
    equal = (got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & want.isnan())
    if not equal.all():
        index = tuple((~equal).nonzero()[0].tolist())
        count = int((~equal).sum())
        raise AssertionError(
            f"{count} differ, first at {index}: {got[index].item()!r}, not {want[index].item()!r}"
        )
    return True
