"""What `prepare(exact=True)` puts in place, and the way back."""

import math
from typing import Any

from torchlamp.huggingface.decode_forwards import HeadDecode
from torchlamp.huggingface.exact import ExactGenerate
from torchlamp.huggingface.exact_model import ExactModel
from torchlamp.huggingface.sharing_copy import sharing_copy
from torchlamp.huggingface.sites import Sites
from torchlamp.huggingface.widening import Widening
from torchlamp.simulation.statistics import Statistics


class ExactPlan:
    """A model in float32, a copy on its weights for someone to prepare, and the model's `generate`.

    The model keeps its own forwards, attention and cache: what it computes is the reference itself.
    """

    generate: ExactGenerate

    def __init__(self, model: Any) -> None:
        self.model = model
        self._widening = Widening(model)
        self.copy = sharing_copy(model)
        self._draft: Any = None
        self._put = False

    def put(self, draft: Any) -> ExactModel:
        """Have the model's `generate` draft by `draft`, the prepared copy."""
        self._draft = draft
        both = ExactModel(self.model, draft, _head(self.model, draft))
        self.generate = ExactGenerate(both)
        self.generate.put()
        self._put = True
        return both

    def undo(self) -> None:
        """Give the model its own `generate` and weights back; a second call does nothing."""
        if self._put:
            self._put = False
            self.generate.undo()
            self._draft.undo()
        self._widening.undo()


def _head(model: Any, draft: Any) -> HeadDecode | None:
    """The model's LM head from the copy that the draft has of it; the two largest logits are exact."""
    low = vars(draft.model.get_output_embeddings()).get("forward")
    if not isinstance(low, HeadDecode):
        return None
    head = HeadDecode(Sites(model).lm_head()[0], low.head, math.inf, 2, Statistics())
    return head if head.is_plain() else None
