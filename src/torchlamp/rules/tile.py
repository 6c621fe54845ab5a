"""What a rule sees: a tile of query rows after the low-precision pass."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A tile of query rows of one attention layer, as the low-precision pass left it.

    Every tensor has the shape (..., rows, keys); the leading dimensions are (batch, heads). Floating tensors
    share one dtype (float32 in the attention loop, float64 is welcome in studies) and one device. Rules read
    and never write them.

    Raises
    ------
    ValueError
        If the shapes differ or `visible` is not boolean.
    """

    #: y: the low-precision product, scaled and rounded again; before softcap and mask.
    scores: Tensor
    #: What enters the softmax: y, or softcap(y), plus a bias if the model has one. Where not visible this is
    #: meaningless, as are `scores`, `slope` and `error`.
    logits: Tensor
    #: z: softmax of the logits over the visible keys (and the attention sink, if any); 0 where not visible.
    probabilities: Tensor
    #: bool: the keys that a row may attend to. A row may have none.
    visible: Tensor
    #: d logits / d scores, for softcap c: 1 - (softcap(y) / c)^2. None means 1 everywhere.
    slope: Tensor | None = None
    #: r: expected size of the rounding error of y, see `Running` and `Bridge`. None unless a rule needs it.
    error: Tensor | None = None
    #: Source of random numbers, on the CPU. None unless a rule needs it.
    generator: torch.Generator | None = None
    #: y in float32, which no hardware could know: for oracles. None unless a rule needs it.
    exact: Tensor | None = None
    #: How far the value of key j is from the row's output o = sum_j z_j v_j: ||v_j - o|| / ||o||, or with the output
    #: projection and relative to the residual stream, see `RunningResidual`. None unless a rule needs it.
    distance: Tensor | None = None
    #: Number of the layer in the model, 0 for the first; the heads of dimension -3 are those of the layer.
    layer: int = 0

    def __post_init__(self) -> None:
        shape = self.scores.shape
        named = {
            "logits": self.logits,
            "probabilities": self.probabilities,
            "visible": self.visible,
            "slope": self.slope,
            "error": self.error,
            "exact": self.exact,
            "distance": self.distance,
        }
        for name, tensor in named.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, scores {tuple(shape)}: "
                    "all tensors of a tile share one shape"
                )
        if len(shape) < 2:
            raise ValueError(f"scores has shape {tuple(shape)}: a tile needs at least (rows, keys)")
        if self.visible.dtype != torch.bool:
            raise ValueError(f"visible has dtype {self.visible.dtype}: it must be torch.bool")

    def to(self, device: torch.device | str) -> Tile:
        """Return the tile with its tensors on another device; the generator stays on the CPU."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **moved)

    @property
    def gain(self) -> Tensor:
        """2 z (1 - z) s: the l1 change of the probabilities per unit of absolute error in y_j (docs/method.md 3.2)."""
        z = self.probabilities
        gain = (1 - z).mul_(z).mul_(2)
        return gain if self.slope is None else gain.mul_(self.slope)

    @classmethod
    def from_scores(
        cls,
        scores: Tensor,
        visible: Tensor | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        error: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tile:
        """Build the tile that a plain attention would show to a rule.

        Parameters
        ----------
        scores
            (..., rows, keys), floating.
        visible
            Bool, broadcastable to `scores`; None: everything is visible.
        softcap
            The c of the softcap c tanh(y / c), > 0; None: no softcap.
        sinks
            Logits of the attention sink, broadcastable to (..., rows, 1); None: no sink.
        error
            The r of `error`, broadcastable to `scores`.
        generator
            For the random rules.

        Returns
        -------
        The tile; rows without a visible key have probability 0 everywhere.
        """
        shown = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand(scores.shape)
        logits, slope = scores, None
        if softcap is not None:
            logits = softcap * torch.tanh(scores / softcap)
            slope = 1 - (logits / softcap).square()
        masked = logits.masked_fill(~shown, -torch.inf)
        if sinks is not None:
            masked = torch.cat([masked, sinks.expand(*scores.shape[:-1], 1).to(masked)], dim=-1)
        probabilities = masked.softmax(dim=-1)[..., : scores.shape[-1]].masked_fill(~shown, 0.0)
        expanded = None if error is None else error.expand(scores.shape)
        return cls(scores, logits, probabilities, shown, slope, expanded, generator)
