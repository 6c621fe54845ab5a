"""Whether a model's weights are those that its low-bit copies were made of."""

from typing import Any

from torch import nn


class WeightVersions:
    """The weights of a model as they are when this is made: where they lie, and how often they were written.

    torch counts what writes into a tensor, `load_state_dict` and optimisers included; writing through ``.data``, NumPy
    or a pointer isn't counted. A copy of the model begins with its weights as they are then.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[str, tuple[int, int]] | None = _versions(model)

    def check(self, model: nn.Module) -> None:
        """ValueError if a weight of the model has been replaced or written since."""
        now = _versions(model)
        if self._seen is None:
            self._seen = now
        changed = [name for name in now if now[name] != self._seen.get(name)]
        if changed or len(now) != len(self._seen):
            name = changed[0] if changed else "a weight that is gone"
            raise ValueError(
                f"weights were changed after prepare ({name}): the low-bit copies are of the old ones; call "
                "torchlamp.prepared(model).undo(), then prepare the model again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    named = model.named_parameters()
    return {name: (p.data_ptr(), -1 if p.is_inference() else p._version) for name, p in named}
