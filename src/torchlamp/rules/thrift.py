"""ThriftAttention's choice of whole blocks before any low pass, and the static one of the first and the last."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.rules.block_view import BlockView, reduced
from torchlamp.rules.rule import Rule, spelled
from torchlamp.rules.tile import Tile

_KINDS = ("means", "quest", "local")
_PARAMETER = re.compile(rf"\s*({'|'.join(_KINDS)})\s*,\s*(\d*\.?\d+(?:[eE]-?\d+)?)\s*", re.ASCII)


@dataclass(frozen=True)
class Thrift(Rule):
    """`thrift:KIND,F`: recompute a fraction F of the 64 x 64 blocks of scores, chosen before there are any scores.

    Each head's query blocks take the key blocks with the largest `means`: product of the block means of q and of k;
    `quest`: bound sum_c max(q_c min_c, q_c max_c), q the block's mean query and min, max over the block's keys; or
    `local`: the most recent ones. Every query block takes equally many, as many as make the fraction hold over the
    causal triangle; what is left over goes to the last query blocks. F in [0, 1].

    Raises
    ------
    ValueError
        If the kind is unknown or F out of range.

    Source: ThriftAttention, arXiv 2605.23081; `quest` after Quest, arXiv 2406.10774. docs/competitors.md.
    """

    choice: tuple[str, float]
    name = "thrift"
    role = "published"
    examples = ("thrift:means,0.05", "thrift:quest,0.1", "thrift:local,0.05")
    looks_through = "blocks"

    def __post_init__(self) -> None:
        kind, fraction = self.choice
        if kind not in _KINDS or isinstance(fraction, bool) or not 0 <= fraction <= 1:
            raise ValueError(
                f"rule thrift: give one of {', '.join(_KINDS)} and a fraction in [0, 1], got {self.choice!r}"
            )
        object.__setattr__(self, "choice", (kind, float(fraction)))

    @property
    def parameter(self) -> str:
        """The kind and F with a comma."""
        return f"{self.choice[0]},{spelled(self.choice[1])}"

    @classmethod
    def from_parameter(cls, text: str | None) -> Rule:
        """Read 'KIND,F'."""
        match = _PARAMETER.fullmatch(text or "")
        if match is None or not 0 <= float(match[2]) <= 1:
            given = cls.name if text is None else f"{cls.name}:{text}"
            raise ValueError(
                f"rule '{given}': thrift takes one of {', '.join(_KINDS)} and a fraction in [0, 1]; write for example "
                f"'{cls.examples[0]}'"
            )
        return cls((match[1], float(match[2])))

    def select(self, tile: Tile) -> Tensor:
        """All visible entries of the chosen blocks."""
        view, (kind, fraction) = tile.blocks, self.choice
        groups, shares = view.key_blocks(), view.share(fraction)
        chosen = torch.zeros_like(tile.visible.expand(tile.scores.shape))
        for number, rows in view.row_blocks():
            worth = _worth(view, kind, rows, groups)
            # Blocks of keys that come after the query block's last row aren't there yet.
            seen = view.visible_blocks(number) - view.first_key // 64
            count = min(shares[number], max(0, seen))
            if not count:
                continue
            best = worth[:, :seen].topk(min(count, worth[:, :seen].shape[1]), dim=-1).indices
            taken = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True)
            chosen[..., rows, :] = taken[:, None, groups]
        return chosen & tile.visible


def _worth(view: BlockView, kind: str, rows: slice, groups: Tensor) -> Tensor:
    """What a query block's key blocks are chosen by, float32 (heads, blocks)."""
    query = view.query[:, rows].mean(1)
    if kind == "local":
        count = int(groups[-1]) + 1 if len(groups) else 0
        return torch.arange(count, device=query.device).float().expand(len(query), count)
    repeats = len(query) // view.key.shape[0]
    if kind == "means":
        means = reduced(view.key, groups, "mean").repeat_interleave(repeats, 0)
        return (means @ query[..., None])[..., 0]
    low = reduced(view.key, groups, "amin").repeat_interleave(repeats, 0)
    high = reduced(view.key, groups, "amax").repeat_interleave(repeats, 0)
    by_channel = torch.maximum(low * query[:, None], high * query[:, None])
    bound: Tensor = by_channel.sum(-1)
    return bound
