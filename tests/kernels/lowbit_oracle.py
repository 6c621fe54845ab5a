"""Quantisation one number at a time: numpy scalars, bfloat16 of ml_dtypes, Python's rounding, none of the package.

Rows are lists of codes and of scales; where a byte of a packed copy lies is worked out anew from the description.
"""

import math

import ml_dtypes
import numpy as np

LARGEST = {4: 7, 8: 127, 12: 2047}
KINDS = ["gaussian", "small", "wide", "special", "extreme", "huge", "tiny"]


def bfloat16_above(x):
    """The smallest bfloat16 number that isn't below x."""
    rounded = ml_dtypes.bfloat16(x)
    if float(rounded) < float(x):
        rounded = np.nextafter(rounded, ml_dtypes.bfloat16(math.inf))
    return rounded


def quantise_row(row, bits):
    """Codes, with those of the columns that fill up the last group, and scales (bfloat16) of a list of floats."""
    codes, scales, largest = [], [], LARGEST[bits]
    for start in range(0, len(row), 32):
        group = [np.float32(x) for x in row[start : start + 32]]
        group += [np.float32(0)] * (32 - len(group))
        if not all(math.isfinite(x) for x in group):
            scale = ml_dtypes.bfloat16(math.nan)
        else:
            scale = bfloat16_above(max(abs(x) for x in group) / np.float32(largest))
        scales.append(scale)
        for x in group:
            code = round(float(x / np.float32(scale))) if float(scale) > 0 else 0
            codes.append(max(-largest, min(largest, code)))
    return codes, scales


def quantise(rows, bits):
    pairs = [quantise_row(row, bits) for row in rows]
    return [codes for codes, _ in pairs], [scales for _, scales in pairs]


def blocks(rows, bits):
    """The bytes of codes, and the patterns of scales, of a copy in blocks."""
    codes, scales = quantise(rows, bits)
    groups = len(scales[0]) if rows else 0
    count, size = -(-len(rows) // 16), {4: 16, 8: 32, 12: 48}[bits]
    packed = np.zeros((count, groups * 16, size), np.uint8)
    patterns = np.zeros((count, groups, 16), np.uint16)
    for r, row in enumerate(codes):
        for g, scale in enumerate(scales[r]):
            patterns[r // 16, g, r % 16] = np.array(scale).view(np.uint16)
        for pair in range(groups * 16):
            for k in (0, 1):
                code, at = row[2 * pair + k], packed[r // 16, pair]
                if bits == 4:
                    at[r % 16] |= (code + 8) << 4 * k
                elif bits == 8:
                    at[2 * (r % 16) + k] = code % 256
                else:
                    at[2 * (r % 16) + k] = code // 16 % 256
                    at[32 + r % 16] |= code % 16 << 4 * k
    return packed.reshape(-1), patterns.reshape(-1)


def pairs(rows, bits):
    """The same of a copy in pairs of rows."""
    codes, scales = quantise(rows, bits)
    groups, count = (len(scales[0]) if rows else 0), -(-len(rows) // 16)
    packed = np.zeros((8 * count, 32 * groups, bits // 4), np.uint8)
    patterns = np.zeros((count, groups, 16), np.uint16)
    for r, row in enumerate(codes):
        for column, code in enumerate(row):
            if bits == 8:
                packed[r // 2, column, r % 2] = code % 256
            else:
                packed[r // 2, column, 0] |= (code + 8) << 4 * (r % 2)
        for g, scale in enumerate(scales[r]):
            patterns[r // 16, g, r % 16] = np.array(scale).view(np.uint16)
    return packed.reshape(-1), patterns.reshape(-1)


def shorts(row):
    """A vector's 16-bit integers and float32 scales."""
    codes, scales = [], []
    for start in range(0, len(row), 32):
        group = [np.float32(x) for x in row[start : start + 32]]
        group += [np.float32(0)] * (32 - len(group))
        scale = np.float32(math.nan)
        if all(math.isfinite(x) for x in group):
            largest = max(abs(x) for x in group)
            scale = largest / np.float32(32767)
            if float(scale) * 32767 < float(largest):
                scale = np.nextafter(scale, np.float32(math.inf))
        scales.append(scale)
        nearest = [round(float(x / scale)) if scale > 0 else 0 for x in group]
        codes += [max(-32767, min(32767, code)) for code in nearest]
    return codes, scales
