"""Jacobians formed explicitly, as oracles for rules that claim to solve a stated problem."""

from itertools import product

import torch
from torch import Tensor


def probabilities(scores: Tensor, sink: float | None = None, softcap: float | None = None) -> Tensor:
    """Softmax of one row of scores (keys,); with a sink its probability is the last component."""
    logits = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if sink is not None:
        logits = torch.cat([logits, torch.tensor([sink], dtype=scores.dtype)])
    return logits.softmax(dim=-1)


def jacobian(scores: Tensor, sink: float | None = None, softcap: float | None = None) -> Tensor:
    """d probabilities / d scores, (keys, keys), with a sink (keys + 1, keys); automatic differentiation."""
    return torch.autograd.functional.jacobian(lambda y: probabilities(y, sink, softcap), scores)


def one_norm(matrix: Tensor) -> float:
    """Operator norm 1 -> 1: the largest column sum."""
    return float(matrix.abs().sum(dim=0).amax())


def inf_norm(matrix: Tensor) -> float:
    """Operator norm inf -> inf: the largest row sum."""
    return float(matrix.abs().sum(dim=1).amax())


def low_sets(keys: int) -> list[Tensor]:
    """All vectors g in {0, 1}^keys, float64; 1 = left in low precision."""
    return [torch.tensor(g, dtype=torch.float64) for g in product((0.0, 1.0), repeat=keys)]
