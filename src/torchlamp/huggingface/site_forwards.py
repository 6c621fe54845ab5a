"""What linear layers and norms of a model run under a policy, in the place of their own forward.

A replaced forward is an attribute of the module instance; taking it away gives the module its class's forward back.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from torchlamp.huggingface.attached_policy import AttachedPolicy
from torchlamp.huggingface.forward_only import forward_only
from torchlamp.huggingface.offloaded import present
from torchlamp.huggingface.wide_forwards import wide_forward
from torchlamp.policy.policy import SitePolicy
from torchlamp.simulation.linear import LinearResult, LookAhead, linears
from torchlamp.simulation.linear_sums import Weights
from torchlamp.simulation.norms import Norm, Normed, norm_input
from torchlamp.simulation.stored import QuantisedMatrix


class Forward(ABC):
    """A module's replaced forward. A deep copy of a model gets its own, which belong to the copy's modules."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        #: What the instance had in this place (other tools replace forwards, too), None: nothing.
        self.own = own_forward(module)
        #: The `Prepared` that put it in place, and takes it away; None: something else did.
        self.prepared: Any = None

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward without us."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        wide = wide_forward(self.module)
        if wide is not None:
            return wide(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    # It counts, and calls kernels that a compiler can't see into (transformers compiles static-cache decoding).
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called by torch in the place of `forward`."""
        return self.run_(*args, **kwargs)

    @abstractmethod
    def run_(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that runs in the place of the module's own; the same arguments and result."""


class SimulatedForward(Forward):
    """A forward of a simulated policy; others belong to low-bit decoding."""


def own_forward(module: nn.Module) -> Any:
    """The forward that a module instance has of its own when ours is left out; None: its class's."""
    own = vars(module).get("forward")
    while isinstance(own, Forward):
        own = own.own
    return own


def plain(module: nn.Module) -> Callable[..., Any]:
    """The module's forward when ours is left out."""
    own = own_forward(module)
    return partial(type(module).forward, module) if own is None else own


def set_forward(module: nn.Module, forward: Any) -> None:
    """Give a module instance a forward, or (None) its class's."""
    if forward is not None:
        module.forward = forward
    elif "forward" in vars(module):
        del module.forward


@dataclass
class Residual:
    """The residual stream before a sublayer's output is added; kept from the sublayer's norm to its last product."""

    x: Tensor | None = None

    def take(self, size: int) -> Tensor | None:
        """The stream as (batch * length, size), which is forgotten."""
        x, self.x = self.x, None
        return None if x is None else x.reshape(-1, size)


class LayerForward(SimulatedForward):
    """A decoder layer: it only notes the positions of the tokens."""

    def __init__(self, module: nn.Module, attached: AttachedPolicy) -> None:
        super().__init__(module)
        self.attached = attached

    def run_(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        positions = kwargs.get("position_ids")
        fits = isinstance(positions, Tensor) and positions.ndim == 2
        self.attached.positions = positions if fits else None
        return self.original(*args, **kwargs)


class NormForward(SimulatedForward):
    """A norm: it notes the residual stream, and reads it rounded where the policy names the site `norm`."""

    def __init__(
        self,
        module: nn.Module,
        attached: AttachedPolicy,
        layer: int,
        norm: Norm,
        policy: SitePolicy | None,
        residual: Residual | None,
        place: str,
    ) -> None:
        super().__init__(module)
        self.attached, self.layer, self.norm, self.policy, self.residual = (
            attached,
            layer,
            norm,
            policy,
            residual,
        )
        #: Which of a layer's norms it is, for calibrations.
        self.place = place

    def run_(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The norm of what it may read."""
        if self.residual is not None:
            self.residual.x = x.detach()
        if self.policy is None:
            return self.original(x, *args, **kwargs)
        check_float32(self.module, x)
        positions = self.attached.positions_of_last(x.shape[-2])
        read = norm_input(
            x.detach(),
            self.norm,
            accumulator=self.policy.accumulate,
            rule=self.policy.rule,
            generator=self.attached.generator(self.policy, "norm", self.layer, last_step(positions)),
            layer=self.layer,
            mean=self._mean(x.detach()),
        )
        record(self.attached, "norm", self.layer, read.eligible, read.selected, positions)
        return self.original(forward_only(read.x, x), *args, **kwargs)

    def _mean(self, x: Tensor) -> Tensor | None:
        """What `center` takes off x (..., length, size): a calibrated mean, or that of each sample's tokens."""
        assert self.policy is not None
        if not self.policy.precision.has("center"):
            return None
        moments = self.attached.input_moments("norm", self.layer, x, self.place)
        mean = x.mean(-2, keepdim=True) if moments is None else moments.mean[0].float()
        return torch.where(mean.isfinite(), mean, 0.0)


class LinearGroup:
    """The linear layers of a site in one decoder layer: one, or several with the same input, looked at together."""

    def __init__(self, attached: AttachedPolicy, site: str, layer: int, policy: SitePolicy) -> None:
        self.attached, self.site, self.layer, self.policy = attached, site, layer, policy
        self.modules: list[nn.Module] = []
        #: What follows the layers, or for a norm of the residual stream the norm and the stream.
        self.next_function: LookAhead | None = None
        self.norm: Norm | None = None
        self.residual: Residual | None = None
        self._maps: list[Weights] = []
        self._copies: list[QuantisedMatrix] = []
        self._pending: tuple[Tensor, dict[int, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a deep copy takes over: not the views of the weights, which the copy's modules have copies of."""
        return {**vars(self), "_maps": [], "_copies": [], "_pending": None}

    def reads(self) -> list[nn.Module]:
        """The modules whose weights a call reads."""
        return self.modules

    def forget(self) -> None:
        """Drop what was made of the weights: offloaded ones must not stay in memory."""
        self._maps, self._copies = [], []

    @property
    def maps(self) -> list[Weights]:
        """The modules' linear maps, whose column norms are computed once."""
        if not self._maps:
            self._maps = [linear_map(module) for module in self.modules]
        return self._maps

    def output(self, module: nn.Module, index: int, x: Tensor) -> Tensor:
        """The output of one of the layers. The first that is called computes all."""
        if self._pending is not None and self._pending[0] is x and index in self._pending[1]:
            output = self._pending[1].pop(index)
            if not self._pending[1]:
                self._pending = None
            return output
        check_float32(module, x)
        positions = self.attached.positions_of_last(x.shape[-2])
        generator = self.attached.generator(self.policy, self.site, self.layer, last_step(positions))
        with present(self.reads()) as brought:
            result = self.compute(x.detach(), generator)
        if brought:
            self.forget()
        record(self.attached, self.site, self.layer, result.eligible, result.selected, positions)
        if self.policy.accumulate.register is not None:
            sums = result.selected.numel() * result.eligible
            self.attached.statistics.record_overflow(self.site, self.layer, result.overflowed, sums)
        outputs = dict(enumerate(result.outputs))
        output = outputs.pop(index)
        self._pending = (x, outputs) if outputs else None
        return output

    def compute(self, x: Tensor, generator: torch.Generator | None) -> LinearResult:
        """All layers of the group, under the site's policy."""
        operand, transforms = self.policy.precision.operand, self.policy.precision.transforms
        if not operand.is_float32 and not transforms and not self._copies:
            self._copies = [
                QuantisedMatrix.store(m.matrix.detach().T, operand, self.policy.accumulate) for m in self.maps
            ]
        return linears(
            x,
            self.maps,
            accumulator=self.policy.accumulate,
            rule=self.policy.rule,
            next_function=self.looks_ahead(),
            generator=generator,
            layer=self.layer,
            operand=operand,
            copies=self._copies or None,
            transforms=transforms,
            moments=self.attached.input_moments(self.site, self.layer, x),
            ranges=self.attached.input_ranges(self.site, self.layer, x),
        )

    def looks_ahead(self) -> LookAhead:
        """What follows the layers; a residual stream is forgotten with the call."""
        if self.next_function is not None:
            return self.next_function
        assert self.norm is not None
        size = self.maps[0].matrix.shape[1]
        return Normed(self.norm, None if self.residual is None else self.residual.take(size))


class LinearForward(SimulatedForward):
    """A linear layer of a group."""

    def __init__(self, module: nn.Module, group: LinearGroup, index: int) -> None:
        super().__init__(module)
        self.group, self.index = group, index

    def run_(self, x: Tensor) -> Tensor:
        """The layer in low precision."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return forward_only(self.group.output(self.module, self.index, x), x, weight)


def linear_map(module: nn.Module) -> Weights:
    """The linear map of a `torch.nn.Linear` or a `Conv1D`, whose weight is (inputs, outputs)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return Weights(weight if isinstance(module, Conv1D) else weight.T, module.bias)  # type: ignore[arg-type]


def last_step(positions: Tensor) -> int:
    """One more than the last position: what sets apart the calls of a layer."""
    return int(positions.max()) + 1 if positions.numel() else 0


def record(
    attached: AttachedPolicy, site: str, layer: int, eligible: int, selected: Tensor, positions: Tensor
) -> None:
    """Count one call of a site without heads: `selected` is int64 (..., length)."""
    rows = selected.reshape(-1, 1, selected.shape[-1])
    attached.statistics.record(site, layer, rows, torch.full_like(rows, eligible), positions)


def check_float32(module: nn.Module, x: Tensor) -> None:
    """Refuse what is no float32 input, and autocast, under which products would run in half precision."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dtype != torch.float32 or autocast:
        raise TypeError(
            f"{type(module).__name__} is given {x.dtype}{' under autocast' if autocast else ''}: rounding is simulated "
            "from float32; load the model with dtype=torch.float32 and leave autocast off"
        )


def group_forwards(modules: Sequence[nn.Module], group: LinearGroup) -> list[Forward]:
    """Put modules into a group; their forwards."""
    group.modules = list(modules)
    return [LinearForward(module, group, index) for index, module in enumerate(modules)]
