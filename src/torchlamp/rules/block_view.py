"""What rules that choose whole blocks of scores see beside them: where a tile stands, its queries and its keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Query rows and keys of a block.
BLOCK = 64


@dataclass(frozen=True, eq=False)
class BlockView:
    """The place of an attention tile among all rows and keys of its call, and the operands in full.

    Blocks are counted from the first query and the first key of the call.

    Attributes
    ----------
    query, key : Tensor
        float32 (heads, rows, size) and (key heads, keys, size), of the tile; heads a multiple of key heads.
    first_row, first_key : int
        Numbers of the tile's first row and key.
    queries, keys : int
        How many the call has; the last query sees all keys.
    """

    query: Tensor
    key: Tensor
    first_row: int
    first_key: int
    queries: int
    keys: int

    def row_blocks(self) -> list[tuple[int, slice]]:
        """Number of each query block that the tile has rows of, and these rows, counted from the tile's first."""
        stop = self.first_row + self.query.shape[-2]
        first = self.first_row // BLOCK
        return [
            (n, slice(max(0, n * BLOCK - self.first_row), min(stop, (n + 1) * BLOCK) - self.first_row))
            for n in range(first, -(-stop // BLOCK))
        ]

    def key_blocks(self) -> Tensor:
        """Number of the block of each key of the tile, counted from the tile's first block; int64 (keys,)."""
        count = self.key.shape[-2]
        numbers = (torch.arange(count, device=self.key.device) + self.first_key) // BLOCK
        return numbers - self.first_key // BLOCK

    def visible_blocks(self, number: int) -> int:
        """How many key blocks the last row of a query block sees, counted from the call's first key."""
        last = min(self.queries, (number + 1) * BLOCK) - 1
        return -(-(self.keys - self.queries + last + 1) // BLOCK)

    def share(self, fraction: float) -> list[int]:
        """How many key blocks each query block takes, so that the fraction holds over the whole triangle.

        As many for each, min(k, those it sees), k the largest that fits; what is left goes to the last query blocks,
        one each.
        """
        seen = [self.visible_blocks(n) for n in range(-(-self.queries // BLOCK))]
        budget = round(fraction * sum(seen))
        k = 0
        while k < max(seen) and sum(min(k + 1, own) for own in seen) <= budget:
            k += 1
        taken = [min(k, own) for own in seen]
        left = budget - sum(taken)
        for n in range(len(seen) - 1, -1, -1):
            if left > 0 and taken[n] < seen[n]:
                taken[n] += 1
                left -= 1
        return taken


def reduced(x: Tensor, groups: Tensor, how: str) -> Tensor:
    """Mean, minimum or maximum over the keys of each block, (key heads, blocks, size) of x (key heads, keys, size)."""
    count = int(groups[-1]) + 1 if len(groups) else 0
    shape = (x.shape[0], count, x.shape[2])
    index = groups[None, :, None].expand(x.shape)
    return x.new_zeros(shape).scatter_reduce(1, index, x, reduce=how, include_self=False)
