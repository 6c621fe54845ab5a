"""Look-ahead through RMSNorm and LayerNorm, from a residual sum or from a sublayer's output alone.

The Jacobians are derived in docs/sites.md, their column norms are compared with automatic differentiation in the
tests.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.kernels.rounding import round_to_grid
from torchlamp.rules.element_tile import ElementTile
from torchlamp.rules.none_all import Nothing
from torchlamp.rules.rule import Rule
from torchlamp.simulation.linear import TINY, LowPass


@dataclass(frozen=True)
class Norm:
    """f(x) = weight * x / sqrt(mean x^2 + eps), or with "layer" weight * (x - m) / sqrt(var + eps) + bias."""

    kind: Literal["rms", "layer"]
    #: float32 (size,): what multiplies the normalised vector (Gemma's 1 + w).
    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-6

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of the last dimension, as the model computes it up to rounding."""
        t, _ = self.normalised(x)
        return t * self.weight if self.bias is None else t * self.weight + self.bias

    def gain(self, x: Tensor) -> Tensor:
        """||J e_j||_2 / ||f(x)||_2: relative change of the norm's output per unit of absolute error in x_j.

        With t the normalised vector, s its divisor, n its length and g the weight, the squared column norms are

            RMSNorm     (g_j^2 (1 - 2 t_j^2 / n) + t_j^2 sum(g^2 t^2) / n^2) / s^2
            LayerNorm   (g_j^2 (1 - 2 (1 + t_j^2) / n) + sum_i g_i^2 (1 + t_i t_j)^2 / n^2) / s^2.

        Parameters
        ----------
        x
            float32 (..., size).
        """
        t, inverse = self.normalised(x)
        n, squares = x.shape[-1], self.weight.square()
        energy = (squares * t * t).sum(dim=-1, keepdim=True)
        if self.kind == "rms":
            columns = squares * (1 - 2 / n * t * t) + t * t * (energy / n**2)
            size = energy
        else:
            mixed = (squares * t).sum(dim=-1, keepdim=True)
            cross = squares.sum() + 2 * t * mixed + t * t * energy
            columns = squares * (1 - 2 / n * (1 + t * t)) + cross / n**2
            size = self(x).square().sum(dim=-1, keepdim=True)
        # A column norm of about 0 may come out a rounding error below it.
        return (columns.clamp_min(0.0) / size.clamp_min(TINY)).sqrt_().mul_(inverse)

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised vector t and 1 / s."""
        centred = x - x.mean(dim=-1, keepdim=True) if self.kind == "layer" else x
        inverse = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + self.eps)
        return centred * inverse, inverse


@dataclass(frozen=True)
class Normed:
    """Look ahead from a sublayer's output Delta through the norm of x = residual + Delta (or of Delta alone).

    Only Delta carries rounding errors, so that the gain is that of x and the score is Delta. The condition number is
    that of the sum x_j, whose numerator has the residual as one more, exact, term left out: numerator / |x_j|.
    """

    norm: Norm
    #: float32 (batch * length, size) or None.
    residual: Tensor | None = None

    def __call__(self, low: LowPass) -> ElementTile:
        """The tile of a chunk of rows."""
        x = low.y if self.residual is None else low.y + self.residual[low.rows]
        return low.element_tile(self.norm.gain(x), 1 / x.abs())


@dataclass(frozen=True)
class NormInput:
    """What a norm reads under a policy.

    Attributes
    ----------
    x : Tensor
        float32 (..., size): rounded, the selected entries in float32.
    eligible : int
        Entries of a row.
    selected : Tensor
        int64 (...): how many of them were kept in float32.
    """

    x: Tensor
    eligible: int
    selected: Tensor


@torch.no_grad()
def norm_input(
    x: Tensor,
    norm: Norm,
    *,
    accumulator: str | Accumulator,
    rule: str | Rule,
    generator: torch.Generator | None = None,
    layer: int = 0,
    mean: Tensor | None = None,
) -> NormInput:
    """A residual sum as its norm reads it: rounded to the accumulator's format, the selected entries in float32.

    The rounding is that of the last addition of the sum, one per entry, so that the expected error is (u / 2) |x_j|
    and `running:T` is `strict:T` with another unit; with `mean`, it is x less the mean that is rounded. The residual
    stream itself isn't changed.

    Parameters
    ----------
    x : Tensor
        float32 (..., size).
    norm : Norm
        What reads it.
    accumulator, rule
        Of the accumulator only the format is used; spellings or objects.
    generator : torch.Generator or None
        On the CPU; needed by random rules, which draw once for all samples (the first of three dimensions or more).
    layer : int
        What the tile says of its layer.
    mean : Tensor or None
        float32, broadcastable to x: taken off before the rounding and added back in float32 after it.

    Raises
    ------
    TypeError
        Not float32.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"norm_input takes float32 input, got {x.dtype}: convert with .float()")
    form, chooser = Accumulator.parse(accumulator).outside_attention().format, Rule.parse(rule)
    narrow = round_to_grid(x if mean is None else x - mean, form.grid)
    rounded = narrow if mean is None else narrow + mean
    if isinstance(chooser, Nothing):
        return NormInput(rounded, x.shape[-1], torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device))
    tile = ElementTile(
        scores=rounded,
        visible=torch.ones_like(x, dtype=torch.bool),
        gain=norm.gain(rounded),
        error=lambda: narrow.abs() * (form.unit_roundoff / 2),
        bridge_error=lambda: narrow.abs() * (form.unit_roundoff / 2),
        exact=x,
        generator=generator,
        layer=layer,
    )
    chosen = chooser.select(tile)
    return NormInput(torch.where(chosen, x, rounded), x.shape[-1], chosen.sum(dim=-1))
