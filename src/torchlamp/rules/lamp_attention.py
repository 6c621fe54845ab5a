"""LampAttention's rule: whole sub-blocks, in two stages, while an online softmax goes through the keys."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor

from torchlamp.rules.online_tile import OnlineTile
from torchlamp.rules.rule import Rule, spelled
from torchlamp.rules.tile import Tile
from torchlamp.rules.two_stages import Setting, two_stages

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_PARAMETER = re.compile(rf"\s*(none|{_NUMBER})\s*,\s*({_NUMBER})\s*((?:/[a-z]+)*)\s*", re.ASCII)
_OPTIONS = ("norms", "greedy", "compact")


@dataclass(frozen=True)
class LampAttention(Rule):
    """`lamp-attention:D,T`: recompute sub-blocks of 16 keys x 16 queries in two stages, tile by tile of 64 keys.

    Stage 1 goes through a tile's sub-blocks by descending threat max_i (max_j y_ij - mu_i), mu the running maximum. One
    stays low iff mu'_i > max_j y_ij + D |mu'_i| for all its queries i; otherwise it is recomputed, and mu' updated
    before the next. Stage 2 keeps as many of the others low as it can while for every query

        sum over low entries of (omega' - e_ij) e_ij <= T omega'^2,

    e the exponentials and omega' their running sum after stage 1, and recomputes the rest without updating mu'.

    D >= 0, or `none` without a first stage; T in [0, 1], and 1 leaves the second stage nothing to do. Options behind
    T: `/norms`, the margin D u |q_i| max_j |k_j| times the scores' factor in place of D |mu'_i|, in steps of one
    rounding's largest error; `/greedy`, stage 2 keeps sub-blocks by ascending sum in place of the largest of all
    subsets; `/compact`, a layout in which a tile with two or more recomputed sub-blocks is recomputed whole. Needs an
    accumulator with an online softmax, such as `lamp8`.

    Raises
    ------
    ValueError
        If D or T is out of range.

    Source: LampAttention, arXiv 2609.39361, equation 7 and its block form; `/norms` derived. docs/lamp-attention.md.
    """

    setting: Setting
    name = "lamp-attention"
    role = "published"
    examples = (
        "lamp-attention:0.00390625,0.5",
        "lamp-attention:0.0625,1",
        "lamp-attention:none,0.125/greedy",
        "lamp-attention:4,0.5/norms/compact",
    )
    looks_through = "online"
    operations = 8.0

    def __post_init__(self) -> None:
        setting = Setting(*self.setting)
        if not (_allows(setting.delta, math.inf) and setting.tau is not None and _allows(setting.tau, 1.0)):
            raise ValueError(
                f"rule lamp-attention: delta must be None or a finite number >= 0 and tau in [0, 1], got {setting!r}"
            )
        delta = None if setting.delta is None else float(setting.delta) + 0.0
        object.__setattr__(self, "setting", setting._replace(delta=delta, tau=float(setting.tau) + 0.0))

    @property
    def parameter(self) -> str:
        """D and T with a comma, and the options."""
        setting = self.setting
        delta = "none" if setting.delta is None else spelled(setting.delta)
        options = "".join(f"/{name}" for name in _OPTIONS if getattr(setting, name))
        return f"{delta},{spelled(setting.tau)}{options}"

    @classmethod
    def from_parameter(cls, text: str | None) -> Rule:
        """Read 'D,T' and the options."""
        match = _PARAMETER.fullmatch(text or "")
        options = [] if match is None else match[3].split("/")[1:]
        fits = match is not None and len(set(options)) == len(options) and set(options) <= set(_OPTIONS)
        if match is not None and fits:
            delta, tau = None if match[1] == "none" else float(match[1]), float(match[2])
            if _allows(delta, math.inf) and _allows(tau, 1.0):
                return cls(Setting(delta, tau, **dict.fromkeys(options, True)))
        given = cls.name if text is None else f"{cls.name}:{text}"
        raise ValueError(
            f"rule '{given}': lamp-attention takes a margin D >= 0 or 'none', a budget T in [0, 1] and the options "
            f"{', '.join('/' + name for name in _OPTIONS)}; write for example '{cls.examples[0]}'"
        )

    def select(self, tile: Tile) -> Tensor:
        """Entries of the sub-blocks that either stage recomputes.

        Raises
        ------
        ValueError
            If the tile isn't one of an online softmax.
        """
        return self.stages(tile)[0]

    def stages(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """What both stages recompute, and the second alone: bool, the shape of the scores."""
        if not isinstance(tile, OnlineTile):
            raise ValueError(
                f"rule '{self}' goes through an online softmax: give it an OnlineTile, which an accumulator such as "
                "'lamp8' makes"
            )
        return two_stages(tile, self.setting)


def _allows(value: float | None, highest: float) -> bool:
    return value is None or (0 <= value <= highest and value < math.inf)
