"""The readable reference of `torchlamp.kernels.integer_products`: the register, product after product, in int64."""

import torch
from torch import Tensor

from torchlamp.kernels.integer_products import Codes, Register, segments


@torch.no_grad()
def integer_products_reference(left: Codes, right: Codes, register: Register) -> tuple[Tensor, Tensor]:
    """The products, float32 (G, M, N), and where a sum didn't fit; arguments as `integer_products` documents them.

    The register wraps after every step, and the exact sums stand beside it in 64 bits.
    """
    groups, rows, _ = left.codes.shape
    columns = right.codes.shape[1]
    repeats = groups // right.codes.shape[0]
    a, b = left.codes.long(), right.codes.long().repeat_interleave(repeats, dim=0)
    powers = torch.zeros_like(a) if left.powers is None else left.powers.long().expand_as(a)
    total = torch.zeros(groups, rows, columns)
    overflowed = torch.zeros(groups, rows, columns, dtype=torch.bool)
    for start, stop in segments(left, right):
        scales = (
            left.scales[..., start // left.length, None]
            * (right.scales[..., start // right.length].repeat_interleave(repeats, dim=0)[:, None, :])
        )
        held, exact = torch.zeros_like(total, dtype=torch.int64), torch.zeros_like(total, dtype=torch.int64)
        for power in range(left.groups - 1, -1, -1):
            if register.shift:
                held, exact = _wrap(held * 2, register.bits), exact * 2
            else:
                held, exact = torch.zeros_like(held), torch.zeros_like(exact)
            for k in range(start, stop):
                here = a[..., k, None] * b[:, None, :, k] * (powers[..., k, None] == power)
                held, exact = _wrap(held + here, register.bits), exact + here
            if not register.shift:
                total = total + held.float() * (scales * 2.0**power)
                overflowed |= held != exact
        if register.shift:
            total = total + held.float() * scales
            overflowed |= held != exact
    return total, overflowed


def _wrap(value: Tensor, bits: int) -> Tensor:
    """Two's complement: the number of the register that equals the value modulo 2^bits."""
    half = 2 ** (bits - 1)
    wrapped: Tensor = (value + half) % (2 * half) - half
    return wrapped
