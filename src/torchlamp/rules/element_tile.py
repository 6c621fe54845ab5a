"""What a rule sees at a linear site: rows of sums that are read one by one or through a norm, not through a softmax."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ElementTile:
    """Rows of a linear layer's output after the low-precision pass, and what the next function makes of errors in it.

    Every tensor has the shape (..., rows, outputs), floating ones share a dtype and a device. Rules read and never
    write them. Rules that look through anything (`strict`, `running`, `budget`, `oracle`, `random`, ...) use `scores`,
    `visible`, `gain`, `error`, `exact` and `generator` of this tile as they do of a softmax `Tile`.

    Raises
    ------
    ValueError
        If the shapes differ or `visible` is not boolean.
    """

    #: y: the low-precision sums, with the bias.
    scores: Tensor
    #: bool: the entries that count. At linear sites all of them.
    visible: Tensor
    #: Normwise relative change of what f gives, per unit of absolute error in y_j (docs/sites.md).
    gain: Tensor
    #: kappa_f(y_j) kappa(inner product): bound on the componentwise relative error of f(y_j), per unit roundoff and
    #: step. Its numerator is the one that the rule asks for, exact or cheap. None unless a rule needs it.
    condition: Tensor | None = None
    #: The numerator of the inner product's condition number, |w_j|^T |x| + |b_j|, or its cheap bound
    #: ||w_j||_2 ||x||_2 + |b_j|. None unless a rule needs it.
    numerator: Tensor | None = None
    #: r: expected size of the rounding error of y, see `Running`. None unless a rule needs it.
    error: Tensor | None = None
    #: y in float32, which no hardware could know: for oracles. None unless a rule needs it.
    exact: Tensor | None = None
    #: Source of random numbers, on the CPU. None unless a rule needs it.
    generator: torch.Generator | None = None
    #: Number of the layer in the model, 0 for the first.
    layer: int = 0

    def __post_init__(self) -> None:
        shape = self.scores.shape
        for field in fields(self):
            tensor = getattr(self, field.name)
            if isinstance(tensor, Tensor) and tensor.shape != shape:
                raise ValueError(
                    f"{field.name} has shape {tuple(tensor.shape)}, scores {tuple(shape)}: "
                    "all tensors of a tile share one shape"
                )
        if len(shape) < 2:
            raise ValueError(f"scores has shape {tuple(shape)}: a tile needs at least (rows, outputs)")
        if self.visible.dtype != torch.bool:
            raise ValueError(f"visible has dtype {self.visible.dtype}: it must be torch.bool")

    def to(self, device: torch.device | str) -> ElementTile:
        """Return the tile with its tensors on another device; the generator stays on the CPU."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **moved)
