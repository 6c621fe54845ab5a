"""A bfloat16 or float16 model that computes in float32 for as long as it is prepared, on its own weights."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchlamp.huggingface.file_weights import FileWeights
from torchlamp.huggingface.site_forwards import Forward, set_forward
from torchlamp.huggingface.wide_forwards import narrow_modules
from torchlamp.huggingface.widening import Widening
from torchlamp.kernels.full_rows import NARROW


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


@dataclass(eq=False)
class OwnVectors:
    """What a module says its state is while vectors of it are widened: those that it had before, in their own dtype.

    `save_pretrained`, `state_dict` and all that is made of it thus give the original weights, bit for bit.
    """

    narrow: dict[str, Tensor]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """A hook of `torch.nn.Module.register_state_dict_post_hook`."""
        for name, tensor in self.narrow.items():
            if prefix + name in state:
                state[prefix + name] = tensor


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
        self._own = [_give_own(module) for module in model.modules()] if narrow else []
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
        while self._own:
            if (hook := self._own.pop()) is not None:
                hook.remove()


def _give_own(module: nn.Module) -> RemovableHandle | None:
    """Have a module's state give the vectors that it has now; None: it has none of half precision."""
    own = chain(module._parameters.items(), module._buffers.items())
    narrow = {name: t.data for name, t in own if t is not None and t.dtype in NARROW and t.ndim <= 1}
    if not narrow:
        return None
    hook: RemovableHandle = module.register_state_dict_post_hook(OwnVectors(narrow))  # type: ignore[no-untyped-call]
    return hook


def _owns_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.ndim > 1 for p in module._parameters.values())
