"""The low-bit copies of a model's weights by their names: made of the weights, or taken from where they were kept."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor


class Copy(Protocol):
    """A low-bit copy that can be kept: `LowBitMatrix`, `LowBitMlp`, `LowBitHead`."""

    def tensors(self) -> dict[str, Tensor]:
        """All that was computed of the weights."""


T = TypeVar("T", bound=Copy)


class Copies:
    """What gives a plan its copies; all that is made is in `tensors`, so that it can be kept.

    Parameters
    ----------
    kept : mapping of str to Tensor, optional
        What `tensors` of the same model under the same policy held once: the copies are made over these tensors, and
        no weight is read. None: copies are made.
    """

    def __init__(self, kept: Mapping[str, Tensor] | None = None) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}
        for path, tensor in (kept or {}).items():
            name, _, part = path.partition("/")
            self._kept.setdefault(name, {})[part] = tensor
        self.are_kept = kept is not None
        #: What was made, by name of the copy, "/" and name of the tensor.
        self.tensors: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        """Whether a copy was kept."""
        return name in self._kept

    def take(self, name: str, of: Callable[[Mapping[str, Tensor]], T], make: Callable[[], T]) -> T:
        """A copy: `of` its tensors where they were kept, else as `make` makes it.

        Raises
        ------
        ValueError
            Copies were kept, and this one isn't among them, or its tensors have other sizes.
        """
        if self.are_kept:
            if name not in self._kept:
                raise ValueError(f"no low-bit copy {name!r} among those that were kept")
            return of(self._kept[name])
        copy = make()
        self.tensors.update({f"{name}/{part}": tensor for part, tensor in copy.tensors().items()})
        return copy
