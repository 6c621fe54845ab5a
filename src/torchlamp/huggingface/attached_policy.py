"""One policy attached to one model: what its modules share, and the context of each module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from torchlamp.arithmetic.tender import Ranges
from torchlamp.arithmetic.transforms.headwise import Headwise, own_keys
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.huggingface.widening import Widening
from torchlamp.policy.policy import SitePolicy
from torchlamp.simulation.ahead import Ahead
from torchlamp.simulation.attention_call import Observation
from torchlamp.simulation.calibration import Calibration, input_moments, score_moments
from torchlamp.simulation.score_biases import ScoreRanges
from torchlamp.simulation.score_operands import ScoreMoments
from torchlamp.simulation.statistics import Statistics

#: Name of the attention that simulates `scores` and `values`.
SIMULATION = "lamp"
_ATTRIBUTE = "_torchlamp"

#: Called with the number of a layer and an observation of one of its attention tiles.
Observer = Callable[[int, Observation], None]


@dataclass
class AttachedPolicy:
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
    #: What follows the heads of each layer, for rules at the site `scores` that look that far.
    aheads: dict[int, Ahead] = field(default_factory=dict)
    #: The mean of each layer's keys, float32 (batch, key heads, size): of those that the sequence under way began with.
    key_means: dict[int, Tensor] = field(default_factory=dict)
    #: Called with the layer and an observation of each of its attention tiles.
    observe: Observer | None = None
    #: The layers whose tiles are observed; None: all. The others keep the fused kernel.
    observe_layers: frozenset[int] | None = None
    #: Statistics that transforms are fitted to; None: those of each call's own operands.
    calibration: Calibration | None = None
    #: Where the statistics of the transforms' operands are put; None: nowhere.
    collect: Calibration | None = None
    #: Half-precision weights that were widened for the policy, until it is detached.
    widening: Widening | None = None

    def observer(self, layer: int) -> Callable[[Observation], None] | None:
        """What is called with each tile of a layer; None: nobody looks."""
        watched = self.observe_layers is None or layer in self.observe_layers
        return partial(self.observe, layer) if self.observe is not None and watched else None

    def policy(self, site: str, layer: int) -> SitePolicy | None:
        """What a site of a layer runs under; None: float32."""
        if self.only is not None and layer >= 0 and layer not in self.only:
            return None
        return self.policies.get(site)

    def generator(
        self, policy: SitePolicy | None, site: str, layer: int, step: int
    ) -> torch.Generator | None:
        """A generator for one call, if its rule or its rounding draws."""
        if policy is None or not policy.needs_generator:
            return None
        return self.statistics.generator(layer, step, site)

    def key_mean(self, layer: int, key: Tensor, queries: int) -> Tensor:
        """The mean that stored keys of a layer are less, as a look-ahead cache keeps it: (batch, key heads, size).

        A call with as many keys (batch, key heads, keys, size) as queries begins a sequence: the mean of its keys. A
        call that goes on with a cache has the mean that the sequence began with, or if there is none of its shape that
        of the keys before the new ones. Numbers that aren't finite count as 0: they would take all keys along.
        """
        batch, heads, keys, size = key.shape
        known = self.key_means.get(layer)
        if keys == queries:
            known = key.mean(2)
        elif known is None or known.shape != (batch, heads, size):
            known = key[:, :, : keys - queries].mean(2)
        self.key_means[layer] = torch.where(known.isfinite(), known, 0.0)
        return self.key_means[layer]

    def score_moments(self, layer: int, query: Tensor, key: Tensor) -> ScoreMoments | None:
        """Calibrated statistics of a layer's queries and keys, if there are; collects the call's where asked to."""
        policy = self.policy("scores", layer)
        if policy is None or not policy.precision.transforms:
            return None
        if Headwise() in policy.precision.transforms:
            key = own_keys(query, key)
        if self.collect is not None:
            # Heads are small, and `fold` wants to know how their channels hang together.
            self.collect.add("scores", layer, *score_moments(query, key, products=True))
        if self.calibration is None:
            return None
        left, right = self.calibration.of("scores", layer, (key.shape[1], key.shape[3]))
        return left, right

    def score_ranges(self, layer: int, query: Tensor, key: Tensor) -> ScoreRanges | None:
        """Calibrated ranges of a layer's queries and keys, (batch, heads, length, size) each, for Tender's operand.

        None where they are the call's own; collects the call's where asked to.
        """
        if self.collect is not None and "scores" in self.collect.ranged:
            self.collect.add_ranges("scores", layer, query, key)
        if not self._wants_ranges("scores", layer) or self.calibration is None:
            return None
        shapes = ((query.shape[1], query.shape[3]), (key.shape[1], key.shape[3]))
        left, right = self.calibration.ranges("scores", layer, *shapes)
        return left, right

    def input_ranges(self, site: str, layer: int, x: Tensor) -> Ranges | None:
        """The same for the inputs (..., length, inputs) of a site's linear layers."""
        if self.collect is not None and site in self.collect.ranged:
            self.collect.add_ranges(site, layer, x.reshape(-1, 1, *x.shape[-2:]))
        if not self._wants_ranges(site, layer) or self.calibration is None:
            return None
        return self.calibration.ranges(site, layer, (1, x.shape[-1]))[0]

    def _wants_ranges(self, site: str, layer: int) -> bool:
        """Whether a site has Tender's operand; changed operands have ranges of their own, which no calibration has."""
        policy = self.policy(site, layer)
        return policy is not None and policy.precision.operand.is_tender and not policy.precision.transforms

    def value_mean(self, layer: int, value: Tensor) -> Tensor | None:
        """The calibrated mean of a layer's values, float32 (key heads, size), for `center` at the site `values`.

        Collects the statistics of the call's values (batch, key heads, keys, size) where asked to.
        """
        policy = self.policy("values", layer)
        if policy is None or not policy.precision.has("center"):
            return None
        if self.collect is not None:
            vectors = value.movedim(1, 0).flatten(1, 2)
            self.collect.add("values", layer, Moments.of(vectors))
        if self.calibration is None:
            return None
        return self.calibration.of("values", layer, (value.shape[1], value.shape[3]))[0].mean.float()

    def input_moments(self, site: str, layer: int, x: Tensor, place: str = "") -> Moments | None:
        """The same for the inputs (..., inputs) of a site's linear layers, or of one of its places in a layer."""
        policy = self.policy(site, layer)
        if policy is None or not policy.precision.transforms:
            return None
        if self.collect is not None:
            needs_products = any(t.needs_products for t in policy.precision.transforms)
            self.collect.add(site + place, layer, input_moments(x, needs_products))
        if self.calibration is None:
            return None
        return self.calibration.of(site + place, layer, (1, x.shape[-1]))[0]

    def positions_of_last(self, length: int) -> Tensor:
        """Positions of the last `length` tokens, (batch or 1, length); counted from 0 where the model doesn't tell."""
        if self.positions is None or self.positions.shape[-1] < length:
            return torch.arange(length)[None]
        return self.positions[:, self.positions.shape[-1] - length :]


@dataclass
class LayerContext:
    """The attached policy and layer number of a module; unknown layers are numbered at their first call."""

    attached: AttachedPolicy
    layer: int | None = None

    def number(self) -> int:
        """The layer number."""
        if self.layer is None:
            self.layer = self.attached.numbered
            self.attached.numbered += 1
        return self.layer


def set_context(module: nn.Module, context: LayerContext | None) -> None:
    """Give a module its context, or take it away (None)."""
    if context is not None:
        setattr(module, _ATTRIBUTE, context)
    elif hasattr(module, _ATTRIBUTE):
        delattr(module, _ATTRIBUTE)


def context_of(module: nn.Module) -> LayerContext | None:
    """A module's context, if a policy is attached to its model."""
    return getattr(module, _ATTRIBUTE, None)
