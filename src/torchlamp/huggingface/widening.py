"""Half-precision checkpoints: their weights as float32, exactly, for as long as something runs in float32."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchlamp.kernels.full_rows import NARROW

logger = logging.getLogger("torchlamp.widening")
#: Classes that were spoken of already.
_MENTIONED: set[str] = set()


class Widening:
    """The tensors that a model had before its weights were widened; `undo` puts these same tensors back.

    Parameters
    ----------
    model : torch.nn.Module
    most : int
        Only tensors of at most so many dimensions are widened: 1 leaves matrices as they are.
    """

    def __init__(self, model: nn.Module, most: int = 99) -> None:
        # What isn't a module is refused, with words, by whoever runs it.
        tensors: list[Tensor] = (
            [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        )
        self._narrow = [
            (tensor, tensor.data) for tensor in tensors if tensor.dtype in NARROW and tensor.ndim <= most
        ]
        if any(tensor.is_meta for tensor, _ in self._narrow):
            raise ValueError(
                f"{type(model).__name__}: its {self._narrow[0][1].dtype} weights are offloaded and can't be widened in "
                "place; load it with dtype=torch.float32"
            )
        if self._narrow and type(model).__name__ not in _MENTIONED:
            _MENTIONED.add(type(model).__name__)
            logger.info(
                "%s has weights of %s: computed in float32, in which they are exact",
                type(model).__name__,
                self._narrow[0][1].dtype,
            )
        # A parameter can't take a tensor that inference mode made.
        with torch.inference_mode(False):
            wide = [narrow.float() for _, narrow in self._narrow]
            # Nothing of the model is changed before all copies are there: memory may run out.
            for (tensor, _), copied in zip(self._narrow, wide, strict=True):
                tensor.data = copied

    def undo(self) -> None:
        """Give every parameter and buffer its own tensor back; a second call does nothing."""
        while self._narrow:
            tensor, narrow = self._narrow.pop()
            tensor.data = narrow


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Run a bfloat16 or float16 model in float32 inside a `with` block; other models stay as they are.

    The float32 evaluation of the model's own weights is the reference of every comparison, and rounding is simulated
    from float32. Parameters and buffers are widened in place, which keeps tied weights tied and everything that refers
    to the modules valid; on exit, also after an exception, they hold the tensors that they held before. Meanwhile the
    weights take three times the memory. Blocks may be nested.
    """
    widening = Widening(model)
    try:
        yield
    finally:
        widening.undo()
