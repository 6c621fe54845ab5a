"""Whether a model's weights are those that its low-bit copies were made of."""

from typing import Any

from torch import Tensor, nn


class WeightVersions:
    """The matrices of a model's modules as they are when this is made: where they lie, and how often they were written.

    torch counts what writes into a tensor, `load_state_dict` and optimisers included; writing through ``.data``, NumPy
    or a pointer isn't counted. A module that takes the place of another runs as it is, and has no copies. A copy of the
    model begins with its weights as they are then.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if _matrices(module)]
        self._seen: list[dict[str, tuple[int, int]]] | None = [_versions(module) for module in self._modules]

    def check(self, model: nn.Module) -> None:
        """ValueError if a matrix of a module has been replaced or written since; `model` has the names."""
        now = [_versions(module) for module in self._modules]
        if self._seen is None:
            self._seen = now
        if now == self._seen:
            return
        paths = {module: path for path, module in model.named_modules()}
        module = next(m for m, a, b in zip(self._modules, now, self._seen, strict=True) if a != b)
        raise ValueError(
            f"weights were changed after prepare ({paths.get(module, type(module).__name__)}): the low-bit copies are "
            "of the old ones; call torchlamp.prepared(model).undo(), then prepare the model again"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_modules": self._modules, "_seen": None}


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module._parameters.items() if p is not None and p.ndim > 1}


def _versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Address and number of writes of each matrix; an inference tensor has no count."""
    found = _matrices(module).items()
    return {name: (p.data_ptr(), -1 if p.is_inference() else p._version) for name, p in found}
