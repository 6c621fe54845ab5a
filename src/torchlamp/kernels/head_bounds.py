"""How far logits from a low-bit head can be from full-precision ones, and which tokens could therefore be the largest.

docs/decoding.md has the proof; `native/lowbit/head.hpp` forms the same bounds.
"""

import torch
from torch import Tensor

from torchlamp.kernels.constants import GROUP
from torchlamp.kernels.reference_lowbit import group_count, quantise_vector

#: Above 1 by more than float32 norms and bounds round.
ABOVE = 1 + 1e-6
#: Smaller norms count as this one: those among subnormal numbers are rounded too coarsely to be bounds.
MIN_NORM = 2.0**-126
#: Products of norms up to which no float32 sum overflows.
_MAX_PRODUCT = 2.0**125
#: Rows that are widened to float64 at a time.
_SLAB_ROWS = 4096


def max_norm(weight: Tensor, errors: Tensor) -> float:
    """At least the 2-norm of every row of a weight float32 (rows, columns) and of its copy with these residuals."""
    slabs = (slab.double().norm(dim=1).max() for slab in torch.split(weight, _SLAB_ROWS) if len(slab))
    norm = max((float(largest) for largest in slabs), default=0.0)
    # The copy's rows are at most their residual longer.
    return (norm + (float(errors.max()) if len(errors) else 0.0)) * ABOVE


def logit_bounds(x: Tensor, errors: Tensor, largest_norm: float) -> tuple[Tensor, Tensor]:
    """Bounds on |low-bit logit - full-precision logit|, and the norms of the vectors.

    Parameters
    ----------
    x : Tensor
        float32 (vectors, columns).
    errors : Tensor
        float32 (tokens,), the rows' residuals.
    largest_norm : float
        `max_norm` of the head.

    Returns
    -------
    float32 (vectors, tokens) and (vectors, 1).
    """
    groups = group_count(x.shape[1])
    norm = (x.double().norm(dim=1, keepdim=True).float() * ABOVE).clamp(min=MIN_NORM)
    codes, scales = quantise_vector(x)
    copy = (codes.view(len(x), groups, GROUP).double() * scales.double()[..., None]).flatten(1)
    residual = (x.double() - copy[:, : x.shape[1]]).norm(dim=1, keepdim=True).float()
    unit = 2.0**-24 * (x.shape[1] / 8 + 40)
    slack = max(largest_norm, MIN_NORM) * (residual + norm * unit) + groups * 2.0**-118
    return errors * norm + slack, norm


def could_win(low: Tensor, bounds: Tensor, norms: Tensor, largest_norm: float, top: int = 1) -> Tensor:
    """Tokens that could be among the `top` largest of full precision: bool, the shape of `low` (vectors, tokens).

    Where a sum could overflow, and where a vector isn't finite, nothing is known of any token.
    """
    lower = torch.nan_to_num(low - bounds, nan=-torch.inf)
    best = lower.topk(min(top, lower.shape[1]), dim=1).values[:, -1:]
    safe = largest_norm * norms <= _MAX_PRODUCT
    return ~((low + bounds < best) & safe)
