"""A bfloat16 or float16 model that computes in float32 for as long as it is prepared, on its own weights."""

from typing import Any

from torch import nn

from torchlamp.huggingface.file_weights import FileWeights
from torchlamp.huggingface.site_forwards import Forward, set_forward
from torchlamp.huggingface.wide_forwards import narrow_modules
from torchlamp.huggingface.widening import Widening


class WideForward(Forward):
    """A module of a half-precision model that runs in float32 on its own weight."""

    def __init__(self, module: nn.Module, weights: FileWeights | None = None) -> None:
        super().__init__(module)
        self.weights = weights

    def run_(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, its weight widened as it is read."""
        result = self.original(*args, **kwargs)
        if self.weights is not None:
            if isinstance(self.module, nn.Embedding):
                self.weights.read_rows(result.numel() // result.shape[-1])
            else:
                self.weights.read_matrices(self.module)
        return result


class WideModel:
    """The forwards of the modules that own half-precision matrices, put in place at once; vectors are widened.

    A model without such matrices stays as it is. With `weights`, all modules that own a matrix get a forward, which
    says what it reads.

    Raises
    ------
    TypeError
        A module of a kind that can't be run in float32 this way; nothing of the model is changed then.
    """

    def __init__(self, model: nn.Module, weights: FileWeights | None = None) -> None:
        self.weights = weights
        narrow = narrow_modules(model)
        told = narrow if weights is None else [m for m in model.modules() if _owns_matrix(m)]
        #: By their modules.
        self.forwards: dict[nn.Module, Forward] = {m: WideForward(m, weights) for m in told}
        self._vectors = Widening(model, most=1) if narrow else None
        for module, forward in self.forwards.items():
            set_forward(module, forward)

    def undo(self) -> None:
        """Give the modules their own forwards and vectors back; a second call does nothing."""
        for module, forward in self.forwards.items():
            set_forward(module, forward.own)
        self.forwards = {}
        if self._vectors is not None:
            self._vectors.undo()


def _owns_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.ndim > 1 for p in module._parameters.values())
