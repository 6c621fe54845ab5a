"""The softmax tile of scores from a stored operand, whose errors need not be small."""

import torch
from torch import Tensor

from torchlamp.rules.tile import Tile

#: Errors beyond a nat are no small ones; z then counts as what it might be so many standard deviations higher.
_FAR, _DEVIATIONS = 1.0, 4.0
_MIN_PROBABILITY, _MAX_EXPONENT = 2.0**-126, 87.0


class StoredTile(Tile):
    """A softmax tile whose errors are those of a low-bit copy.

    To first order an error r_j moves the probabilities by 2 z_j (1 - z_j) s_j r_j. That says nothing once r_j exceeds a
    nat, as with 4 bits it can: there z_j counts as what it might be four standard deviations higher, and 1 - z_j and
    s_j as 1. So rules that weigh an error by the gain see the kernels' weight (docs/decoding.md).
    """

    @property
    def gain(self) -> Tensor:
        """2 z (1 - z) s where r <= 1, 2 min(1, z e^(4 r)) beyond it."""
        small, r = super().gain, self.error
        far = r > _FAR
        if not bool(far.any()):
            return small
        raised = torch.exp((_DEVIATIONS * r).clamp(max=_MAX_EXPONENT))
        return torch.where(
            far, 2 * (self.probabilities.clamp(min=_MIN_PROBABILITY) * raised).clamp(max=1), small
        )
