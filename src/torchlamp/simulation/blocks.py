"""Which blocks of keys each query sees, and in which of them something is recomputed.

Hardware recomputes blocks rather than entries: 16 keys of one query, or 16 keys of 16 neighbouring queries.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchlamp.kernels.constants import BLOCK_KEYS
from torchlamp.kernels.constants import BLOCK_TOUCHED as TOUCHED
from torchlamp.kernels.constants import BLOCK_VISIBLE as VISIBLE


def mark_blocks(visible: Tensor, chosen: Tensor, first_key: int, keys: int) -> Tensor:
    """Marks of the blocks of some rows.

    Parameters
    ----------
    visible, chosen : Tensor
        bool (heads or 1, rows, n) and (heads, rows, n), of the keys first_key ... first_key + n.
    first_key, keys : int
        Where they start, and how many keys the call has.

    Returns
    -------
    uint8 (heads, rows, ceil(keys / 16)), bits VISIBLE and TOUCHED.
    """
    blocks = -(-keys // BLOCK_KEYS)

    def any_in_block(mask: Tensor) -> Tensor:
        whole = pad(mask, (first_key, blocks * BLOCK_KEYS - first_key - mask.shape[-1]))
        return whole.reshape(*whole.shape[:-1], blocks, BLOCK_KEYS).any(dim=-1).to(torch.uint8)

    return any_in_block(visible) * VISIBLE + any_in_block(chosen) * TOUCHED


def count_blocks(marks: Tensor) -> Tensor:
    """Eligible and touched blocks: int64 (2, 2), rows 1 x 16 and 16 x 16, columns eligible and touched.

    Parameters
    ----------
    marks : Tensor
        uint8 (batch, heads, queries, blocks). The 16 queries of a tile are those whose number in the call starts
        with the same multiple of 16.
    """
    batch, heads, queries, blocks = marks.shape
    missing = -queries % BLOCK_KEYS
    tall = pad(marks, (0, 0, 0, missing)).reshape(batch, heads, -1, BLOCK_KEYS, blocks)
    counts = []
    for bit in (VISIBLE, TOUCHED):
        has = (tall & bit) != 0
        counts.append(torch.stack([has.sum(), has.any(dim=3).sum()]))
    return torch.stack(counts, dim=1)
