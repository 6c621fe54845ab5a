"""Attention masks as the decoding kernels take them: which keys a query sees, and nothing else."""

import torch
from torch import Tensor


def seen_keys(mask: Tensor) -> Tensor | None:
    """The keys that each query sees, where a mask says no more than that.

    Parameters
    ----------
    mask : Tensor
        (batch or 1, heads or 1, queries, keys). bool: True where a query sees a key. Numbers are added to the scores,
        as transformers' eager attention adds them.

    Returns
    -------
    Tensor or None
        bool (batch or 1, queries, keys). None where heads have masks of their own, or where a number is a bias: neither
        0 nor at most half of the dtype's lowest, which hides a key whatever its score.
    """
    if mask.shape[1] != 1:
        return None
    seen = sees(mask)
    if mask.dtype != torch.bool and not bool((~seen | (mask == 0)).all()):
        return None
    return seen[:, 0]


def sees(mask: Tensor) -> Tensor:
    """A bool tensor of the mask's shape, False where a key is hidden whatever its score. NaN is seen, and spreads."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        return torch.ones_like(mask, dtype=torch.bool)
    return ~(mask <= torch.finfo(mask.dtype).min / 2)
