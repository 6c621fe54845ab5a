"""The softmax tile of scores from a stored operand, whose errors need not be small."""

from torch import Tensor

from torchlamp.kernels.look_ahead import softmax_gain
from torchlamp.rules.tile import Tile


class StoredTile(Tile):
    """A softmax tile whose errors are those of a low-bit copy: rules that weigh them see the kernels' weight."""

    @property
    def gain(self) -> Tensor:
        """`torchlamp.kernels.look_ahead.softmax_gain`: 2 z (1 - z) s for errors below a nat."""
        return softmax_gain(self.probabilities, self.error, self.slope)
