"""One policy attached to one model: what its modules share, and each module's place in it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchlamp.policy.policy import SitePolicy
from torchlamp.simulation.ahead import Ahead
from torchlamp.simulation.attention import Observation
from torchlamp.simulation.statistics import Statistics

_ATTRIBUTE = "_torchlamp"


@dataclass
class Run:
    """One policy attached to one model."""

    policies: dict[str, SitePolicy]
    statistics: Statistics
    #: The layers that run under the policy; None: all.
    only: frozenset[int] | None = None
    #: Layers numbered so far, where the model doesn't tell.
    numbered: int = 0
    #: Position of each token of the forward pass that is under way, (batch or 1, length).
    positions: Tensor | None = None
    #: Column norms (heads, value size) of each layer's output projection, for the site `values`.
    value_norms: dict[int, Tensor] = field(default_factory=dict)
    #: What lies behind the heads of each layer, for rules at the site `scores` that look that far.
    aheads: dict[int, Ahead] = field(default_factory=dict)
    #: Called with the layer and an observation of each of its attention tiles.
    observe: Callable[[int, Observation], None] | None = None

    def policy(self, site: str, layer: int) -> SitePolicy | None:
        """What a site of a layer runs under; None: float32."""
        if self.only is not None and layer >= 0 and layer not in self.only:
            return None
        return self.policies.get(site)

    def generator(
        self, policy: SitePolicy | None, site: str, layer: int, step: int
    ) -> torch.Generator | None:
        """A generator for one call, if its rule draws."""
        if policy is None or not policy.rule.needs_generator:
            return None
        return self.statistics.generator(layer, step, site)

    def places(self, length: int) -> Tensor:
        """Positions of the last `length` tokens, (batch or 1, length); counted from 0 where the model doesn't tell."""
        if self.positions is None or self.positions.shape[-1] < length:
            return torch.arange(length)[None]
        return self.positions[:, self.positions.shape[-1] - length :]


@dataclass
class Seat:
    """A module's place in a run; where layers can't be told, they are numbered at their first call."""

    run: Run
    layer: int | None = None

    def number(self) -> int:
        """The layer number."""
        if self.layer is None:
            self.layer = self.run.numbered
            self.run.numbered += 1
        return self.layer


def place(module: nn.Module, seat: Seat | None) -> None:
    """Give a module its place in a run, or take it away (None)."""
    if seat is not None:
        setattr(module, _ATTRIBUTE, seat)
    elif hasattr(module, _ATTRIBUTE):
        delattr(module, _ATTRIBUTE)


def place_of(module: nn.Module) -> Seat | None:
    """A module's place in a run, if it has one."""
    return getattr(module, _ATTRIBUTE, None)
