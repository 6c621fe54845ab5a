"""A bfloat16 or float16 model that computes in float32 for as long as it is prepared, on its own weights."""

from typing import Any

from torch import nn

from torchlamp.huggingface.site_forwards import Forward, set_forward
from torchlamp.huggingface.wide_forwards import narrow_modules
from torchlamp.huggingface.widening import Widening


class WideForward(Forward):
    """A module of a half-precision model that runs in float32 on its own weight."""

    def run_(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, its weight widened as it is read."""
        return self.original(*args, **kwargs)


class WideModel:
    """The forwards of the modules that own half-precision matrices, put in place at once; vectors are widened.

    A model without such matrices stays as it is.

    Raises
    ------
    TypeError
        A module of a kind that can't be run in float32 this way; nothing of the model is changed then.
    """

    def __init__(self, model: nn.Module) -> None:
        #: By their modules.
        self.forwards: dict[nn.Module, Forward] = {m: WideForward(m) for m in narrow_modules(model)}
        self._vectors = Widening(model, most=1) if self.forwards else None
        for module, forward in self.forwards.items():
            set_forward(module, forward)

    def undo(self) -> None:
        """Give the modules their own forwards and vectors back; a second call does nothing."""
        for module, forward in self.forwards.items():
            set_forward(module, forward.own)
        self.forwards = {}
        if self._vectors is not None:
            self._vectors.undo()
