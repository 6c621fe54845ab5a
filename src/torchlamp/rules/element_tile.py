"""What a rule sees at a linear site: rows of sums that are read one by one or through a norm, not through a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlamp.rules.answers import Answer
from torchlamp.rules.tile import Tile


class ElementTile(Tile):
    """Rows of a linear layer's output after the low-precision pass, and what the next function makes of errors in it.

    Every tensor has the shape (..., rows, outputs), floating ones share a dtype and a device. Rules that look through
    anything (`strict`, `running`, `budget`, `oracle`, `random`, ...) ask this tile what they ask a softmax tile; it has
    no logits, probabilities and distances.

    Parameters
    ----------
    scores
        y: the low-precision sums, with the bias.
    visible
        bool: the entries that count. At linear sites all of them.
    gain
        Normwise relative change of what f gives, per unit of absolute error in y_j (docs/sites.md).
    condition, cheap_condition
        kappa_f(y_j) kappa(inner product): bound on the componentwise relative error of f(y_j), per unit roundoff and
        step; with the exact numerator and with the cheap one.
    numerator, cheap_numerator
        The numerator of the inner product's condition number, |w_j|^T |x| + |b_j|, and its bound
        ||w_j||_2 ||x||_2 + |b_j|.
    error, bridge_error, exact, generator, layer
        As for `Tile`.

    Raises
    ------
    ValueError
        If the shapes differ or `visible` is not boolean.
    """

    def __init__(
        self,
        scores: Tensor,
        visible: Tensor,
        gain: Tensor,
        condition: Answer = None,
        numerator: Answer = None,
        error: Answer = None,
        exact: Answer = None,
        generator: torch.Generator | None = None,
        layer: int = 0,
        *,
        cheap_condition: Answer = None,
        cheap_numerator: Answer = None,
        bridge_error: Answer = None,
    ) -> None:
        answers: dict[str, Answer] = {
            "gain": gain,
            "condition": condition,
            "numerator": numerator,
            "cheap_condition": cheap_condition,
            "cheap_numerator": cheap_numerator,
            "error": error,
            "bridge_error": bridge_error,
            "exact": exact,
        }
        self._set(scores, visible, None, generator, layer, answers)

    @property
    def gain(self) -> Tensor:
        """Normwise relative change of what f gives, per unit of absolute error in y_j."""
        gain = self.answers["gain"]
        assert isinstance(gain, Tensor)
        return gain
