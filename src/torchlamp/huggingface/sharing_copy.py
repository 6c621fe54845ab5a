"""A second model on the weights of the first."""

import copy
from typing import Any

from torch import nn


def sharing_copy(model: nn.Module) -> Any:
    """A copy of a model whose parameters and buffers are the model's own; modules and config are the copy's."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)
