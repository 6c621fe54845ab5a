"""Attributes of a tile that are computed when a rule first asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torchlamp.rules.tile import Tile

#: A tensor, a function that computes it when it is first asked for, or None: the tile can't tell.
Answer = Tensor | Callable[[], Tensor] | None


class Asked:
    """An attribute of a tile, given as an `Answer` and read as a tensor: computed at most once, its shape checked.

    Parameters
    ----------
    meaning
        For the error message of a tile that has no answer.

    Raises
    ------
    ValueError
        When a tile without an answer is asked, or the answer's shape isn't that of the tile's scores.
    """

    def __init__(self, meaning: str) -> None:
        self._meaning = meaning
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, tile: Tile, owner: type | None = None) -> Tensor:
        answer = tile.answers.get(self._name)
        if answer is None:
            raise ValueError(
                f"the tile has no `{self._name}`, {self._meaning}: give the tile `{self._name}`, a tensor or a "
                "function that returns one"
            )
        if not isinstance(answer, Tensor):
            answer = checked(self._name, answer(), tile.scores)
            tile.answers[self._name] = answer
        return answer


def checked(name: str, tensor: Tensor, scores: Tensor) -> Tensor:
    """The tensor, refused with a ValueError where its shape isn't that of the scores."""
    if tensor.shape != scores.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, scores {tuple(scores.shape)}: "
            "all tensors of a tile share one shape"
        )
    return tensor
