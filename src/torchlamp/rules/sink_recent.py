"""A static baseline: the first and the last keys of every row, whatever the scores are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.rule import Rule
from torchlamp.rules.tile import Tile

_PARAMETER = re.compile(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", re.ASCII)


@dataclass(frozen=True)
class SinkRecent(Rule):
    """`sink-recent:S,R`: recompute the first S and the last R visible keys of every row.

    Attention sinks and the diagonal are where large probabilities tend to be, and this needs no second look at
    anything: the baseline that says what looking ahead is worth beyond position. With padding or a sliding window
    the keys that a row sees are counted, not their places in the cache.

    Raises
    ------
    ValueError
        If S or R is no whole number from 0 to 999999999.

    Source: derived; the pattern is known from attention sinks in caches (StreamingLLM, arXiv 2309.17453).
    """

    keys: tuple[int, int]
    name = "sink-recent"
    role = "static"
    examples = ("sink-recent:1,2", "sink-recent:4,16", "sink-recent:0,1")
    looks_through = "attention"

    def __post_init__(self) -> None:
        if len(self.keys) != 2 or not all(type(n) is int and 0 <= n < 10**9 for n in self.keys):
            raise ValueError(
                f"rule sink-recent: keys must be two whole numbers from 0 to 999999999, got {self.keys!r}"
            )

    @property
    def parameter(self) -> str:
        """S and R with a comma."""
        return f"{self.keys[0]},{self.keys[1]}"

    @classmethod
    def from_parameter(cls, text: str | None) -> Rule:
        """Read 'S,R'."""
        match = _PARAMETER.fullmatch(text or "")
        if match is None:
            given = cls.name if text is None else f"{cls.name}:{text}"
            raise ValueError(
                f"rule '{given}': sink-recent takes two whole numbers, the first S and the last R keys; "
                f"write for example '{cls.examples[0]}'"
            )
        return cls((int(match[1]), int(match[2])))

    def select(self, tile: Tile) -> Tensor:
        """The first S and the last R visible keys."""
        first, last = self.keys
        rank = tile.visible.cumsum(dim=-1)
        return ((rank <= first) | (rank > rank[..., -1:] - last)) & tile.visible
