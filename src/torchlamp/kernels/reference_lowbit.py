"""The references of the low-bit kernels: how a matrix becomes codes and scales, and what they are worth.

A row is cut into groups of 32 columns. A group's scale s is its largest magnitude over the largest code, rounded up to
a bfloat16 number; a code is round(x / s), ties to even, so that |x - s c| <= s / 2 but for the rounding of the
quotient. Where a group holds an infinity or NaN its scale is NaN, and so is every product with it.

Two layouts. In blocks, sixteen rows lie together, [block][pair of columns][row of the block], 4, 8 or 12 bits a code:
a pair of 4-bit codes is a byte (first column low, both plus 8); one of 8-bit codes two bytes; 12-bit codes have their
high 8 bits like 8-bit codes and behind those of all sixteen rows their low 4 bits like 4-bit ones, but not plus 8. In
pairs of rows, [pair of rows][column][row of the pair], 4 or 8 bits a code, two 4-bit codes in a byte (first row low,
both plus 8); scales lie as in blocks. Rows that fill up the last block are bytes of zeros.
"""

import torch
from torch import Tensor

from torchlamp.kernels.constants import GROUP, LARGEST_CODE, LARGEST_SHORT, ROWS

_BF16_NAN, _BF16_INFINITY = 0x7FC0, 0x7F80
#: Rows of a matrix that are widened to float64 at a time.
_SLAB_ROWS = 4096


def group_count(columns: int) -> int:
    """Scales of a row."""
    return -(-columns // GROUP)


def block_count(rows: int) -> int:
    """Blocks of a matrix."""
    return -(-rows // ROWS)


def code_bytes(bits: int, columns: int) -> int:
    """Bytes of the codes of one row, in either layout."""
    return group_count(columns) * GROUP * bits // 8


@torch.no_grad()
def pack_blocks(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a matrix into blocks.

    Parameters
    ----------
    x
        (rows, columns) float32.
    bits
        4, 8 or 12.

    Returns
    -------
    codes uint8 (blocks * 16 * code_bytes,) and scales, bfloat16 patterns as uint16 (blocks * groups * 16,), both byte
    for byte those of the native kernel; errors float32 (blocks * 16,): at least the 2-norm of each row minus its copy,
    to 1e-6, not finite where the row isn't.
    """
    codes, scales, errors = _quantise(x, bits)
    pairs = codes.view(len(x), group_count(x.shape[1]) * GROUP // 2, 2)
    if bits == 4:
        packed = _interleave(_nibbles(pairs[..., 0] + 8, pairs[..., 1] + 8)[..., None])
    elif bits == 8:
        packed = _interleave(_byte(pairs))
    else:
        low = _nibbles(pairs[..., 0] & 15, pairs[..., 1] & 15)[..., None]
        packed = torch.cat([_interleave(_byte(pairs >> 4)), _interleave(low)], dim=-1)
    padding = block_count(len(x)) * ROWS - len(x)
    by_block = _interleave(scales[..., None]).flatten().view(torch.uint16)
    return packed.flatten(), by_block, _pad(errors, padding)


@torch.no_grad()
def unpack_blocks(codes: Tensor, scales: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """What a copy in blocks stands for: float32 (rows, columns), NaN where a group's scale is."""
    integers, factors = block_integers(codes, scales, bits, rows, columns)
    return _scaled(integers, factors, torch.float32)[:, :columns]


@torch.no_grad()
def quantise_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int32 (rows, groups * 32) and scales, bfloat16 patterns in int16 (rows, groups), of float32 rows."""
    codes, scales, _ = _quantise(x, bits)
    return codes, scales


@torch.no_grad()
def join_pairs(integers: Tensor, patterns: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The layout in pairs of rows.

    `integers` (rows, groups * 32) and `patterns` int16 (rows, groups), whole blocks of rows; codes uint8 (rows / 2,
    2 * code_bytes) and scales uint16 (rows / 16, groups * 16), both byte for byte those of the native kernel.
    """
    first, second = integers.view(len(integers) // 2, 2, -1).unbind(1)
    packed = (
        _nibbles(first + 8, second + 8) if bits == 4 else _byte(torch.stack([first, second], -1)).flatten(1)
    )
    scales = patterns.view(len(patterns) // ROWS, ROWS, -1).transpose(1, 2).flatten(1)
    return packed, scales.contiguous().view(torch.uint16)


@torch.no_grad()
def split_pairs(codes: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The integers and patterns that `join_pairs` made these codes and scales of."""
    if bits == 4:
        both = codes.to(torch.int32)
        integers = torch.stack([both & 15, both >> 4], dim=1) - 8
    else:
        integers = codes.view(torch.int8).to(torch.int32).view(len(codes), -1, 2).transpose(1, 2)
    patterns = scales.view(torch.int16).view(len(scales), -1, ROWS).transpose(1, 2)
    rows = 2 * len(codes)
    return integers.reshape(rows, -1), patterns.reshape(rows, -1)


@torch.no_grad()
def unpack_pairs(codes: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """What a copy in pairs of rows stands for: float32 (rows, columns), NaN where a group's scale is."""
    integers, patterns = split_pairs(codes, scales, bits)
    return _scaled(integers, _widen_scales(patterns), torch.float32)[:, :columns]


@torch.no_grad()
def quantise_vector(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors as 16-bit integers with a float32 scale for each group of 32.

    Parameters
    ----------
    x
        (vectors, columns) float32.

    Returns
    -------
    codes int16 (vectors, groups * 32), zeros behind the last column, and scales float32 (vectors, groups):
    |x - scale * code| <= scale * (1/2 + 2^-10). The scale is NaN, and the codes 0, where a group isn't finite.
    """
    groups = _groups(x)
    magnitude = groups.abs().amax(-1) if groups.numel() else groups.new_zeros(groups.shape[:2])
    scales = magnitude / torch.full_like(magnitude, LARGEST_SHORT)
    # Rounded up, which matters among subnormal numbers only: there rounding down would leave much beyond the last code.
    below = scales.double() * LARGEST_SHORT < magnitude.double()
    scales = torch.where(below, torch.nextafter(scales, torch.full_like(scales, torch.inf)), scales)
    finite = scales.isfinite()
    codes = (groups / scales[..., None]).round().clamp(-LARGEST_SHORT, LARGEST_SHORT)
    codes = torch.where((finite & (scales > 0))[..., None], codes, 0.0)
    return codes.to(torch.int16).flatten(1), torch.where(finite, scales, torch.nan)


@torch.no_grad()
def products(codes: Tensor, scales: Tensor, bits: int, rows: int, x: Tensor) -> Tensor:
    """A matrix in blocks times vectors that are quantised to 16-bit integers first.

    Parameters
    ----------
    codes, scales, bits, rows
        The matrix, as `pack_blocks` gives it.
    x
        (vectors, columns) float32.

    Returns
    -------
    float32 (vectors, rows), summed in float64 from the quantised operands. With t_g the sum of a group's products of
    integers, s_g and r_g its two scales, the native kernel adds t_g * (s_g r_g) in float32, group after group, and
    differs by at most (groups + 3) 2^-24 sum |t_g s_g r_g|, plus sum (|t_g| + 1) 2^-149 where it underflows; the first
    factor is to be raised by 1e-6. Sums of integers are exact. Where float32 overflows on the way, the native kernel's
    result is infinite or NaN.
    """
    vector_codes, vector_scales = quantise_vector(x)
    vectors = _scaled(vector_codes, vector_scales, torch.float64)
    out = x.new_empty(len(x), rows)
    code_row, scale_row = code_bytes(bits, x.shape[1]), group_count(x.shape[1])
    for first in range(0, rows, _SLAB_ROWS):
        last = min(first + _SLAB_ROWS, rows)
        some = block_count(last) * ROWS
        integers, factors = block_integers(
            codes[first * code_row : some * code_row],
            scales[first * scale_row : some * scale_row],
            bits,
            last - first,
            x.shape[1],
        )
        out[:, first:last] = vectors @ _scaled(integers, factors, torch.float64).T
    return out


@torch.no_grad()
def block_integers(
    codes: Tensor, scales: Tensor, bits: int, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """The codes int32 (rows, groups * 32) and the scales float32 (rows, groups) of a copy in blocks."""
    blocks, pairs = block_count(rows), group_count(columns) * GROUP // 2
    packed = codes.view(blocks, pairs, ROWS * bits // 4)
    if bits == 4:
        both = packed.to(torch.int32)
        integers = torch.stack([both & 15, both >> 4], dim=-1) - 8
    else:
        integers = packed[..., : 2 * ROWS].contiguous().view(torch.int8).to(torch.int32)
        integers = integers.view(blocks, pairs, ROWS, 2)
        if bits == 12:
            both = packed[..., 2 * ROWS :].to(torch.int32)
            integers = integers * 16 + torch.stack([both & 15, both >> 4], dim=-1)
    wide = _widen_scales(scales).view(blocks, group_count(columns), ROWS).transpose(1, 2)
    by_row = integers.permute(0, 2, 1, 3).reshape(blocks * ROWS, 2 * pairs)
    return by_row[:rows], wide.reshape(blocks * ROWS, group_count(columns))[:rows]


def _quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int32 (rows, groups * 32), scales as bfloat16 patterns in int16 (rows, groups), errors (rows,)."""
    groups, largest = _groups(x), LARGEST_CODE[bits]
    magnitude = groups.abs().amax(-1) if groups.numel() else groups.new_zeros(groups.shape[:2])
    quotient = magnitude / torch.full_like(magnitude, largest)
    pattern = (quotient.view(torch.int32).long() + 0xFFFF) >> 16
    pattern = torch.where(quotient.isfinite() & (pattern < _BF16_INFINITY), pattern, _BF16_NAN)
    scales = (pattern << 16).to(torch.int32).view(torch.float32)[..., None]
    codes = (groups / scales).round().clamp(-largest, largest)
    codes = torch.where(scales > 0, codes, 0.0)  # false for NaN
    left = torch.where(scales > 0, groups.double() - scales.double() * codes.double(), groups.double())
    errors = (left * left).sum(dim=(1, 2)).sqrt() * (1 + 1e-6)
    nearest = errors.float()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    errors = torch.where(nearest.double() < errors, above, nearest)
    return codes.to(torch.int32).flatten(1), pattern.to(torch.int16), errors


def _groups(x: Tensor) -> Tensor:
    """The rows in groups, (rows, groups, 32), zeros behind the last column."""
    padded = torch.nn.functional.pad(x, (0, group_count(x.shape[1]) * GROUP - x.shape[1]))
    return padded.view(len(x), group_count(x.shape[1]), GROUP)


def _scaled(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers (rows, groups * 32) times their groups' scales (rows, groups)."""
    groups = integers.view(*scales.shape, GROUP).to(dtype)
    return (groups * scales.to(dtype)[..., None]).flatten(1)


def _widen_scales(scales: Tensor) -> Tensor:
    """The patterns of bfloat16 numbers, in uint16, as float32."""
    return (scales.view(torch.int16).to(torch.int32) << 16).view(torch.float32)


def _nibbles(low: Tensor, high: Tensor) -> Tensor:
    """Two integers 0..15 in one byte."""
    return (low | high << 4).to(torch.uint8)


def _byte(integers: Tensor) -> Tensor:
    """Integers -128..127 as the bytes that hold them."""
    return integers.to(torch.int8).view(torch.uint8)


def _interleave(rows: Tensor) -> Tensor:
    """(rows, n, m) as (blocks, n, 16 * m), zeros for the rows that the last block lacks."""
    count, n, m = rows.shape
    blocks = block_count(count)
    padded = _pad(rows, blocks * ROWS - count).view(blocks, ROWS, n, m)
    return padded.transpose(1, 2).reshape(blocks, n, ROWS * m)


def _pad(x: Tensor, rows: int) -> Tensor:
    """`x` with that many rows of zeros behind it."""
    return torch.cat([x, x.new_zeros(rows, *x.shape[1:])]) if rows else x
