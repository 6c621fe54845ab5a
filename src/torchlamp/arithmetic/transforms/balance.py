"""`balance`: the basis in which both operands have the same, diagonal second moments."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Change, Mapped, Side, Transform

#: Share of the mean eigenvalue that is added to each, so that M and its inverse stay well-conditioned.
REGULARISATION = 1e-4

#: Multiply-adds of a symmetric eigenproblem with vectors, and of the factor and its inverse, over K^3.
EIGENPROBLEM = 10


@dataclass(frozen=True)
class Balance(Transform):
    """q.k = (M^-T q).(M k) with M that makes E q q^T and E k k^T equal and diagonal, energies ascending.

    This is the balanced realisation of linear systems: with E k k^T = L L^T and L^T E q q^T L = U S^2 U^T,
    M = S^(1/2) U^T L^-1. Energy concentrates in few terms, and these come last. Source: derived, docs/transforms.md 3.
    """

    name = "balance"
    summary = "a basis in which both operands have equal and diagonal second moments, ascending"
    needs_products = True

    def fit(self, left: Moments, right: Moments, side: Side) -> Change:
        """The map from the regularised second moments, in float64."""
        factor, below = _factor(_regular(right.second))
        energies, basis = torch.linalg.eigh(factor.mT @ _regular(left.second) @ factor)
        # Moments that are rounding errors have negative energies: M and its inverse stay finite.
        least = REGULARISATION**2 * energies.abs().mean(-1, keepdim=True)
        roots = energies.maximum(least.clamp_min(torch.finfo(torch.float64).tiny)).pow(0.25)
        inverse = (factor @ basis) / roots[:, None, :]
        return Mapped(inverse, roots[:, :, None] * (basis.mT @ below))

    def operations(self, left: int, right: int, depth: int, *, fitted: bool) -> float:
        """K multiply-adds for each number; the moments are half as many, and the eigenproblem about 10 K^3."""
        mapped = (left + right) * depth * depth
        return float(mapped + fitted * (mapped / 2 + EIGENPROBLEM * depth**3))


def _factor(second: Tensor) -> tuple[Tensor, Tensor]:
    """L with L L^T = second moments (Gb, K, K), and L^-1.

    Means taken off may leave moments that are rounding errors, with negative eigenvalues; these become the smallest
    that regularisation allows.
    """
    factor, failed = torch.linalg.cholesky_ex(second)
    if not bool(failed.any()):
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        return factor, torch.linalg.solve_triangular(factor, identity, upper=False)
    energies, basis = torch.linalg.eigh(second)
    roots = energies.maximum(REGULARISATION * energies.abs().mean(-1, keepdim=True)).sqrt()
    return basis * roots[:, None, :], (basis / roots[:, None, :]).mT


def _regular(second: Tensor) -> Tensor:
    """Second moments (Gb, K, K) with a share of their mean eigenvalue on the diagonal; the identity for none."""
    mean = second.diagonal(dim1=1, dim2=2).mean(-1)
    usable = mean.isfinite() & (mean > 0)
    added = torch.where(usable, REGULARISATION * mean, 1.0)[:, None]
    return torch.where(usable[:, None, None], second, 0.0) + torch.diag_embed(
        added.expand(-1, second.shape[-1])
    )
