"""Operands as integers and scales: what a register sums, and which operands it takes."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.quantise import integer_codes
from torchlamp.kernels.integer_products import Codes

#: The largest magnitude of a code of b bits is 2^(b - 1) - 1; whole numbers without a name may have 16 bits.
_LARGEST_WHOLE = 2**15


def check_integers(operand: Operand, accumulator: str, shift: bool) -> None:
    """ValueError for an operand that an integer register doesn't take, with one that it does."""
    block = operand.block
    if block is None or not isinstance(block.element, int):
        fitting = "tender4/8" if shift else "int8"
        raise ValueError(
            f"accumulator '{accumulator}' sums integers, and operand '{operand}' has none: write for example "
            f"'{fitting}@{accumulator}'"
        )
    if shift and block.length > 0:
        raise ValueError(
            f"accumulator '{accumulator}' shifts between scales that are powers of two apart, and those of '{operand}' "
            f"aren't: write '{operand}@int32', 'int{block.element}/row@{accumulator}' or "
            f"'tender{min(block.element, 8)}/8@{accumulator}'"
        )


def codes_of(x: Tensor, operand: Operand) -> Codes:
    """The codes of an integer operand that isn't Tender's, float32 (batch, vectors, K)."""
    block, depth = operand.block, x.shape[-1]
    assert block is not None
    assert isinstance(block.element, int)
    if block.length < 0:
        codes, scales = integer_codes(x.reshape(1, 1, -1), block)
        return Codes(
            codes.reshape(x.shape), scales.expand(*x.shape[:2], 1), block.largest_code, max(1, depth)
        )
    length = max(1, min(block.length, depth) if block.length else depth)
    groups = pad(x, (0, -depth % length)).view(*x.shape[:2], -1, length)
    codes, scales = integer_codes(groups, block)
    return Codes(codes.flatten(2)[..., :depth], scales[..., 0], block.largest_code, length)


def whole_codes(x: Tensor, accumulator: str) -> Codes:
    """The codes of vectors (batch, vectors, K) that are whole numbers already.

    Raises
    ------
    ValueError
        Numbers that aren't whole, or larger than 2^15.
    """
    if not bool(((x == x.round()) & (x.abs() <= _LARGEST_WHOLE)).all()):
        raise ValueError(
            f"accumulator '{accumulator}' sums integers: give operands='int8/row', or tensors of whole numbers up to "
            f"{_LARGEST_WHOLE}"
        )
    ones = torch.ones(*x.shape[:2], 1, dtype=torch.float32, device=x.device)
    return Codes(x, ones, _LARGEST_WHOLE, max(1, x.shape[-1]))
