"""Rules for linear layers: the condition number of the inner product times that of the function after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torchlamp.rules.rule import NumberRule, Role
from torchlamp.rules.threshold import exceeds
from torchlamp.rules.tile import Tile


@dataclass(frozen=True)
class Condition(NumberRule):
    """`condition:T`: recompute j iff kappa_f(y_j) kappa(w_j, x) > T.

    kappa(w_j, x) = (|w_j|^T |x| + |b_j|) / |y_j| is the condition number of the inner product that y_j is, and
    kappa_f(y_j) = |y_j f'(y_j) / f(y_j)| that of the elementwise function after it. Their product times K u bounds
    the relative error of f(y_j) for K summands and unit roundoff u, so this is the optimum of "leave as many entries
    low as possible while every component of f(y) has a relative error of at most T K u": it decouples. For a GLU
    phi(a) * b the gate's entry has kappa_phi(a_j) kappa(w_j, x), the other's kappa(v_j, x). Where f doesn't react to
    y_j at all (a ReLU below 0) the product is 0.

    T >= 0 is that condition number; 1 is a sum without cancellation. NaN and infinite sums are selected.

    The numerator costs a matrix product of its own; `condition-cheap` bounds it instead.

    Source: El Arar, Filip, Mary, Riccietti, arXiv 2503.15568, Algorithm 1; docs/sites.md.
    """

    threshold: float
    name = "condition"
    role: ClassVar[Role] = "published"
    examples = ("condition:4", "condition:30")
    looks_through = "elementwise"
    operations = 4.0

    def select(self, tile: Tile) -> Tensor:
        """Entries whose condition number exceeds T."""
        return exceeds(tile, tile.condition, self.threshold)


@dataclass(frozen=True)
class ConditionCheap(Condition):
    """`condition-cheap:T`: `condition:T` with ||w_j||_2 ||x||_2 + |b_j| in the place of |w_j|^T |x| + |b_j|.

    By Cauchy and Schwarz the product of the norms is an upper bound. The norms of the weights are static and computed
    once, that of x once per row, so that the look-ahead costs a few operations per entry. For Gaussian w and x the
    bound is pi/2 times the true numerator, the same factor for all entries, so T has to be about 1.6 times larger.

    Source: derived from the same, docs/sites.md.
    """

    name = "condition-cheap"
    examples = ("condition-cheap:6", "condition-cheap:50")
    operations = 3.0
    role = "ours"

    def select(self, tile: Tile) -> Tensor:
        """Entries whose bound of the condition number exceeds T."""
        return exceeds(tile, tile.cheap_condition, self.threshold)


@dataclass(frozen=True)
class Output(NumberRule):
    """`output:T`: recompute j iff gain_j (|w_j|^T |x| + |b_j|) > T.

    The condition number weighed by what the next layer does: gain_j is the normwise relative change of what f and the
    next weight make of y, per unit of absolute error in y_j, and the numerator times K u bounds that error. For a GLU
    h = phi(a) b with o = W h this is |kappa_phi(a_j)| kappa(a_j) |h_j| ||W e_j|| / ||o|| for the gate and
    kappa(b_j) |h_j| ||W e_j|| / ||o|| for the other, written without a division: an activation that is nearly 0 has a
    large condition number and no weight. `running:T` is the same rule with the expected error instead of the bound.

    T >= 0; a sum left low changes the next layer's output by at most T K u in norm, relatively. NaN and infinite sums
    are selected. The numerator costs a matrix product of its own; `output-cheap` bounds it instead.

    Source: derived, docs/sites.md.
    """

    threshold: float
    name = "output"
    examples = ("output:0.1", "output:0.01")
    looks_through = "elementwise"
    operations = 2.0

    def select(self, tile: Tile) -> Tensor:
        """Entries whose bound on the relative change of the output exceeds T."""
        return exceeds(tile, tile.gain * tile.numerator, self.threshold)


@dataclass(frozen=True)
class OutputCheap(Output):
    """`output-cheap:T`: `output:T` with ||w_j||_2 ||x||_2 + |b_j| in the place of |w_j|^T |x| + |b_j|.

    Source: derived, docs/sites.md.
    """

    name = "output-cheap"
    examples = ("output-cheap:0.1", "output-cheap:0.01")
    operations = 3.0

    def select(self, tile: Tile) -> Tensor:
        """Entries whose cheap bound on the relative change of the output exceeds T."""
        return exceeds(tile, tile.gain * tile.cheap_numerator, self.threshold)
