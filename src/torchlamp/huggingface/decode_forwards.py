"""What modules of a prepared model run when one token of each sequence is decoded; anything longer runs as before."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchlamp.decoding.head import LowBitHead
from torchlamp.decoding.mlp import LowBitMlp, activate
from torchlamp.huggingface.forward_only import forward_only
from torchlamp.huggingface.site_forwards import Forward, check_float32
from torchlamp.huggingface.sites import Sites
from torchlamp.kernels.constants import ACTIVATIONS
from torchlamp.kernels.low_bit_matrix import LowBitMatrix
from torchlamp.policy.decodable import Settings
from torchlamp.simulation.statistics import Statistics


class DecodeForward(Forward):
    """A module's forward for single tokens, (batch, 1, size); the module's own for everything else."""

    def run_(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The low-bit kernel, or the module."""
        if x.ndim != 3 or x.shape[1] != 1 or args or kwargs:
            return self.original(x, *args, **kwargs)
        check_float32(self.module, x)
        return forward_only(self.decode(x.detach().reshape(len(x), -1).contiguous()).unsqueeze(1), x)

    def decode(self, x: Tensor) -> Tensor:
        """float32 (batch, columns) to (batch, outputs)."""
        raise NotImplementedError


class LinearDecode(DecodeForward):
    """One of the linear layers that read the same input; the first that is called computes all."""

    def __init__(self, module: nn.Module, group: "LinearsDecode", index: int) -> None:
        super().__init__(module)
        self.group, self.index = group, index

    def run_(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The low-bit kernel, or the module."""
        if x.ndim != 3 or x.shape[1] != 1 or args or kwargs:
            return self.original(x, *args, **kwargs)
        ready = self.group.waiting
        if ready is None or ready[0] is not x or self.index not in ready[1]:
            check_float32(self.module, x)
            parts = self.group.outputs(x.detach().reshape(len(x), -1).contiguous())
            ready = (x, {i: forward_only(part.unsqueeze(1), x) for i, part in enumerate(parts)})
        output = ready[1].pop(self.index)
        self.group.waiting = ready if ready[1] else None
        return output


class LinearsDecode:
    """Linear layers with the same input as one low-bit matrix: their rows one below the other."""

    def __init__(self, sites: Sites, modules: list[nn.Module], settings: Settings) -> None:
        maps = [sites.weights(module) for module in modules]
        rows = [m.matrix.detach().T for m in maps]
        self.sizes = [len(r) for r in rows]
        self.matrix = LowBitMatrix.pack(torch.cat(rows), settings.bits)
        biases = [
            torch.zeros(n) if m.bias is None else m.bias.detach()
            for m, n in zip(maps, self.sizes, strict=True)
        ]
        self.bias = torch.cat(biases) if any(m.bias is not None for m in maps) else None
        self.waiting: tuple[Tensor, dict[int, Tensor]] | None = None

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """float32 (batch, columns) to one (batch, outputs) for each layer."""
        y = self.matrix.products(x)
        if self.bias is not None:
            y = y + self.bias
        return torch.split(y, self.sizes, dim=1) if len(self.sizes) > 1 else (y,)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "waiting": None}


class MlpDecode(DecodeForward):
    """A gated MLP."""

    def __init__(
        self,
        module: nn.Module,
        mlp: LowBitMlp,
        thresholds: tuple[float, float],
        statistics: Statistics,
        number: int,
    ) -> None:
        super().__init__(module)
        self.mlp, self.thresholds, self.statistics, self.number = mlp, thresholds, statistics, number

    def decode(self, x: Tensor) -> Tensor:
        """float32 (batch, columns) to (batch, outputs)."""
        y, recomputed, read = self.mlp.run(x, *self.thresholds)
        eligible = len(x) * self.mlp.gate.rows
        self.statistics.record("mlp_up", self.number, recomputed, eligible)
        self.statistics.record("mlp_down", self.number, read, eligible)
        return y


class HeadDecode(DecodeForward):
    """The LM head."""

    def __init__(
        self, module: nn.Module, head: LowBitHead, threshold: float, top: int, statistics: Statistics
    ) -> None:
        super().__init__(module)
        self.head, self.threshold, self.top, self.statistics = head, threshold, top, statistics

    def decode(self, x: Tensor) -> Tensor:
        """float32 (batch, columns) to logits (batch, tokens)."""
        logits, _, recomputed = self.head.run(x, self.threshold, self.top)
        self.statistics.record("lm_head", -1, recomputed, logits.numel())
        return logits


def linears_decode(
    sites: Sites, modules: list[nn.Module], settings: Settings
) -> tuple[list[Forward], LinearsDecode]:
    """Forwards of linear layers with the same input, and what they share."""
    group = LinearsDecode(sites, modules, settings)
    return [LinearDecode(module, group, index) for index, module in enumerate(modules)], group


def check_mlp(sites: Sites, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor, str]:
    """Gate, up and down projection of a layer, float32 (outputs, inputs) each, and the activation's name.

    Raises
    ------
    ValueError
        No gated MLP, one with biases, or an activation that the kernel doesn't know.
    """
    modules, gated = sites.mlp_up(layer)
    maps = [sites.weights(module) for module in [*modules, sites.mlp_down(layer)]]
    if not gated or any(m.bias is not None for m in maps):
        raise ValueError(
            "sites mlp_up and mlp_down of decoding: the kernel runs gated MLPs without biases only; leave both out"
        )
    *inner, out = [m.matrix.detach().T for m in maps]
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2)
    return gate, up, out, _activation(sites.activation(layer))


def mlp_decode(
    sites: Sites, number: int, up: Settings, down: Settings, statistics: Statistics, full: torch.dtype
) -> MlpDecode:
    """The forward of the MLP of layer `number`; raises as `check_mlp` does."""
    layer = sites.layers[number]
    mlp = LowBitMlp.pack(*check_mlp(sites, layer), up.bits, down.bits, full)
    return MlpDecode(layer.mlp, mlp, (up.threshold, down.threshold), statistics, number)  # type: ignore[arg-type]


def check_head(sites: Sites) -> tuple[nn.Module, Tensor]:
    """The LM head and its weight, float32 (tokens, columns). ValueError for a bias, which the proof doesn't cover."""
    module, _ = sites.lm_head()
    weights = sites.weights(module)
    if weights.bias is not None:
        raise ValueError(
            "site lm_head of decoding: the head has a bias, which its bounds don't cover; leave it out"
        )
    return module, weights.matrix.detach().T


def head_decode(sites: Sites, settings: Settings, top: int, statistics: Statistics) -> HeadDecode:
    """The forward of the LM head; raises as `check_head` does."""
    module, weight = check_head(sites)
    return HeadDecode(module, LowBitHead.pack(weight, settings.bits), settings.threshold, top, statistics)


def _activation(module: Callable[[Tensor], Tensor]) -> str:
    """The kernel's name of an elementwise function, told by its values."""
    probe = torch.linspace(-6.0, 6.0, 97)
    for name in ACTIVATIONS:
        if torch.allclose(module(probe), activate(name, probe)[0], rtol=1e-5, atol=1e-6):
            return name
    raise ValueError(
        f"activation {type(module).__name__} of the MLP: the decoding kernel knows {' and '.join(ACTIVATIONS)}; leave "
        "out mlp_up and mlp_down"
    )
