"""Look-ahead from the LM head's logits through the vocabulary softmax."""

from dataclasses import dataclass

import torch

from torchlamp.rules.tile import Tile
from torchlamp.simulation.linear import LowPass
from torchlamp.simulation.softmax import capped_logits, visible_softmax


@dataclass(frozen=True)
class Vocabulary:
    """The ordinary softmax tile of a row of logits, every token visible.

    `softcap` is the c > 0 of final logits c tanh(y / c), as Gemma 2 has them: the slope 1 - tanh(y / c)^2 weighs in as
    it does in attention. None: no softcap.
    """

    softcap: float | None = None

    def __call__(self, low: LowPass) -> Tile:
        """The tile of a chunk of rows."""
        logits, slope = capped_logits(low.y, self.softcap, None)
        return Tile(
            scores=low.y,
            logits=logits,
            probabilities=visible_softmax(logits, None, None),
            visible=torch.ones(1, 1, dtype=torch.bool, device=low.y.device).expand(low.y.shape),
            slope=slope,
            error=low.error,
            bridge_error=low.bridge_error,
            generator=low.generator,
            exact=low.exact,
            layer=low.layer,
        )
