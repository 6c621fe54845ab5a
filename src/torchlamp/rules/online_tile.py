"""What a rule sees of an online softmax in tiles of keys: narrow logits, and those that recomputation would give."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchlamp.kernels.online import OnlineFormats
from torchlamp.rules.answers import Answer, Asked
from torchlamp.rules.tile import Tile


class OnlineTile(Tile):
    """A `Tile` of an online softmax, for rules that go through it as hardware does, tile of keys by tile of keys.

    Other rules read it as any tile: its `probabilities` are the softmax of the narrow logits.

    Parameters
    ----------
    scores, logits, probabilities, visible, slope, **others
        As for `Tile`; `scores` and `logits` are numbers of the narrow format.
    recomputed
        What the logits are when they are recomputed, numbers of the wide format. A rule reads those of sub-blocks that
        it has chosen.
    margin
        u |q| |k_j| times the scores' factor: by Cauchy and Schwarz the largest error of one rounding of the sum y_j,
        to first order.
    formats
        Of scores, shifts and exponentials.
    offset
        Place of the first key in its tile of 64 keys.
    sink
        A logit that enters the normaliser, broadcastable to (..., rows, 1); None: there is none.

    Raises
    ------
    ValueError
        If the shapes differ or `visible` is not boolean.
    """

    recomputed = Asked("the logits that recomputation gives")
    margin = Asked("the bound on the error of one rounding")

    def __init__(
        self,
        scores: Tensor,
        logits: Tensor,
        probabilities: Tensor,
        visible: Tensor,
        slope: Tensor | None = None,
        *,
        recomputed: Answer,
        formats: OnlineFormats,
        margin: Answer = None,
        offset: int = 0,
        sink: Tensor | None = None,
        **others: Any,
    ) -> None:
        super().__init__(scores, logits, probabilities, visible, slope, **others)
        self.answers.update(recomputed=recomputed, margin=margin)
        self.formats, self.offset, self.sink = formats, offset, sink
