"""A static competitor: some heads in float32 always, the others never."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.rules.rule import Rule
from torchlamp.rules.tile import Tile

_PARAMETER = re.compile(r"\d{1,6}\.\d{1,6}(/\d{1,6}\.\d{1,6})*", re.ASCII)


@dataclass(frozen=True)
class Heads(Rule):
    """`heads:L.H/L.H/...`: recompute every visible entry of these heads (layer.head, both from 0), and no other.

    If the entries that matter cluster in a few heads, a choice made once on a calibration text does as well as
    looking ahead, without a second pass; `torchlamp.evaluation.heads.choose_heads` makes that choice.

    Raises
    ------
    ValueError
        If there is no head, or a number is no whole number from 0 to 999999.

    Source: derived (static per-head precision), docs/method.md 4.10.
    """

    heads: frozenset[tuple[int, int]]
    name = "heads"
    role = "static"
    examples = ("heads:0.0", "heads:0.1/3.0")
    looks_through = "attention"

    def __post_init__(self) -> None:
        heads = frozenset(self.heads)
        if not heads or not all(type(n) is int and 0 <= n < 10**6 for head in heads for n in head):
            raise ValueError(
                f"rule heads: give at least one (layer, head), both from 0 to 999999, got {self.heads!r}"
            )
        object.__setattr__(self, "heads", heads)

    @property
    def parameter(self) -> str:
        """The heads in order."""
        return "/".join(f"{layer}.{head}" for layer, head in sorted(self.heads))

    @classmethod
    def from_parameter(cls, text: str | None) -> Rule:
        """Read 'L.H/L.H'."""
        if text is None or not _PARAMETER.fullmatch(text.strip()):
            given = cls.name if text is None else f"{cls.name}:{text}"
            raise ValueError(
                f"rule '{given}': heads takes layer.head, several with '/'; write for example '{cls.examples[1]}'"
            )
        pairs = (pair.split(".") for pair in text.strip().split("/"))
        return cls(frozenset((int(layer), int(head)) for layer, head in pairs))

    def select(self, tile: Tile) -> Tensor:
        """All visible entries of the tile's chosen heads."""
        count = tile.scores.shape[-3] if tile.scores.dim() >= 3 else 1
        chosen = torch.tensor([(tile.layer, head) in self.heads for head in range(count)], dtype=torch.bool)
        shape = (count, 1, 1) if tile.scores.dim() >= 3 else (1, 1)
        return tile.visible & chosen.view(shape).to(tile.visible.device)
