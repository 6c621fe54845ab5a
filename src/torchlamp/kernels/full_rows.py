"""Full-precision matrices in float32, bfloat16 or float16, read a slab of rows at a time.

bfloat16 and float16 numbers are float32 numbers, so that widening is exact; a slab is small enough that no float32 copy
of a matrix is ever there.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

#: What float32 holds exactly.
NARROW = (torch.bfloat16, torch.float16)
#: Dtypes of a full-precision matrix.
FULL = (torch.float32, *NARROW)
#: Numbers that are widened at a time: 4 MiB of float32.
SLAB = 2**20


def slabs(weight: Tensor, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
    """The rows of a matrix (rows, columns) in float32, some at a time, and the number of the first of them.

    Every slab but the last has a multiple of `multiple` rows. A float32 matrix is one slab, as it is.
    """
    rows = len(weight)
    together = max(SLAB // max(weight.shape[1], 1), 1)
    together = max(together - together % multiple, multiple) if weight.dtype in NARROW else max(rows, 1)
    for first in range(0, rows, together):
        yield first, weight[first : first + together].float()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + bias in float32: `x` float32 (..., columns), `weight` (rows, columns), `bias` (rows,); (..., rows)."""
    if weight.dtype == torch.float32 or not len(weight):
        return torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
    parts = []
    for first, rows in slabs(weight):
        added = None if bias is None else bias[first : first + len(rows)].float()
        parts.append(torch.nn.functional.linear(x, rows, added))
    return torch.cat(parts, dim=-1)
