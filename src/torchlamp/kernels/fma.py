"""A true float32 fused multiply-add in torch, bit for bit what libm's `fmaf` gives, wherever float64 is.

Torch has no such operation whose rounding is promised everywhere, so it is built from exact pieces: the
product of two float32 numbers is exact in float64; the sum of that and the addend is rounded in float64 to
odd; and a number rounded to odd with at least two bits to spare rounds to float32 as the unrounded number
would.

References
----------
Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
odd", IEEE Transactions on Computers 57(4), 2008. The error of the sum: Knuth's TwoSum.
"""

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The float32 value of a * b + c with one rounding, to nearest-even.

    Parameters
    ----------
    a, b, c
        float32, shapes that broadcast. `a` and `b` may be float64 tensors that hold float32 values, which
        saves a conversion in loops.

    Returns
    -------
    float32 of the broadcast shape: subnormal results, signed zeros, infinities and NaN as in IEEE 754.
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    # TwoSum: total + error is the sum exactly. NaN where anything is infinite; then no comparison holds.
    added = total - product
    error = (product - (total - added)).add_(addend - added)
    error.mul_(total)
    inward = error < 0
    inexact = inward | (error > 0)
    # Round to odd: step back to the truncated sum, then set its last bit where anything was cut off.
    pattern = total.view(torch.int64)
    pattern.sub_(inward.to(torch.int64)).bitwise_or_(inexact)
    return total.float()
