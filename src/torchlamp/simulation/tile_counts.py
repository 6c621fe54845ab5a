"""Counts of an online softmax's tiles: how many of their sub-blocks are recomputed, and scores that saturate.

A tile is 64 keys of 16 query rows, its sub-blocks 16 keys each; only those count in which a row sees a key.
"""

import torch
from torch import Tensor

from torchlamp.kernels.online import SUB_BLOCK, TILE_KEYS, in_blocks
from torchlamp.kernels.specification import Grid

_SUB_BLOCKS = TILE_KEYS // SUB_BLOCK
#: Places of the counts: tiles with 0, 1, ... 4 recomputed sub-blocks; then sub-blocks, those recomputed, scores, and
#: scores at the end of the narrow format's range.
_ELIGIBLE, _TOUCHED, _SCORES, _SATURATED = range(_SUB_BLOCKS + 1, _SUB_BLOCKS + 5)
COUNTS = _SUB_BLOCKS + 5
#: Share of saturated scores beyond which a run says so.
_LARGEST_SHARE = 1e-4


def count_tiles(visible: Tensor, chosen: Tensor, scores: Tensor, grid: Grid, offset: int) -> Tensor:
    """The counts of some query rows, int64 (COUNTS,).

    Parameters
    ----------
    visible, chosen : Tensor
        bool (heads, rows, keys).
    scores : Tensor
        float32 (heads, rows, keys): the narrow sums.
    grid : Grid
        Their format.
    offset : int
        Place of the first key in its tile.
    """
    seen, touched = (in_blocks(mask, offset, False).any(-1).any(2) for mask in (visible, chosen & visible))
    per_tile = touched.sum(-1)[seen.any(-1)]
    ends = visible & ~(scores.abs() < grid.max_value)
    parts = [seen.sum(), touched.sum(), visible.sum(), ends.sum()]
    return torch.cat([torch.bincount(per_tile.flatten(), minlength=_SUB_BLOCKS + 1), torch.stack(parts)])


def tile_rates(counts: Tensor) -> dict[str, float]:
    """Shares of tiles with "0", "1" and "2+" recomputed sub-blocks, of sub-blocks recomputed ("sub_block"), and of
    scores at the end of the format's range ("saturated"); empty without tiles.

    Tiles with "2+" are disruptive where registers are laid out compactly: they have room for one sub-block.
    """
    tiles = [int(n) for n in counts[: _SUB_BLOCKS + 1]]
    if not sum(tiles):
        return {}
    shares = [n / sum(tiles) for n in (tiles[0], tiles[1], sum(tiles[2:]))]
    blocks, touched, scores, saturated = (int(counts[i]) for i in (_ELIGIBLE, _TOUCHED, _SCORES, _SATURATED))
    return dict(zip(("0", "1", "2+"), shares, strict=True)) | {
        "sub_block": touched / blocks,
        "saturated": saturated / scores,
    }


def saturation_warning(counts: Tensor) -> str | None:
    """One line for a run in which more than a few scores saturate; None for others."""
    share = tile_rates(counts).get("saturated", 0.0)
    if share <= _LARGEST_SHARE:
        return None
    return f"{share:.2%} of the narrow scores are at the end of their format's range: name the transform 'center'"
