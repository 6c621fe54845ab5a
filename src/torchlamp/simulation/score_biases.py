"""Tender's operands of attention scores: both sides less a bias, and the products of the biases.

q.k = q'.k' + b.k + q'.a, where q' = q - b is a query less the bias of its chunk of queries, and k' = k - a a key less
that of its chunk of keys. q' is grouped over the head's channels, k' has one scale a token; the two corrections are
formed in float32 of the operands in full.

Source: Tender, arXiv 2406.12930, section 4, and its published code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.low_operands import LowOperand, left_operand, right_operand
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.tender import CHUNK, Ranges
from torchlamp.kernels.products import products
from torchlamp.kernels.specification import Accumulation, Grid

_FLOAT32 = Accumulation(Grid())
#: Calibrated ranges of a layer's queries and keys, (heads, chunks, size) and (key heads, chunks, size).
ScoreRanges = tuple[Ranges, Ranges]


@dataclass(frozen=True, eq=False)
class ScoreBiases:
    """What the scores of biased operands lack.

    Attributes
    ----------
    of_queries : Tensor
        float32 (batch, heads, query chunks, keys): b.k of each chunk's bias b.
    of_keys : Tensor
        float32 (batch, heads, queries, key chunks): q'.a of each chunk's bias a.
    """

    of_queries: Tensor
    of_keys: Tensor

    def products(self, sample: int, rows: slice, keys: slice) -> Tensor:
        """What some scores lack, float32 (heads, rows, keys), before they are scaled."""
        by_row = torch.arange(rows.start, rows.stop, device=self.of_queries.device) // CHUNK
        by_key = torch.arange(keys.start, keys.stop, device=self.of_queries.device) // CHUNK
        of_queries = self.of_queries[sample, :, :, keys].index_select(1, by_row)
        return of_queries + self.of_keys[sample, :, rows].index_select(2, by_key)


def biased(
    query: Tensor, key: Tensor, operand: Operand, accumulator: Accumulator, ranges: ScoreRanges | None
) -> tuple[LowOperand, LowOperand, ScoreBiases]:
    """Operands of the low pass, (batch * heads, queries, size) and (batch * key heads, keys, size), and their biases.

    Parameters
    ----------
    query, key : Tensor
        float32 (batch, heads, queries, size) and (batch, key heads, keys, size).
    operand, accumulator
        Tender's, and what sums it.
    ranges : pair of Ranges, optional
        Calibrated ones; None: those of the call.
    """
    batch, heads, queries, size = query.shape
    key_heads, keys = key.shape[1:3]
    known = (None, None) if ranges is None else tuple(_repeated(r, batch) for r in ranges)
    left = left_operand(query.flatten(0, 1), operand, accumulator, known[0])
    of_keys = Ranges.of(key.flatten(0, 1)) if known[1] is None else known[1]
    bias = _usable(of_keys.low / 2 + of_keys.high / 2)
    spread = bias.repeat_interleave(CHUNK, dim=1)
    if spread.shape[1] < keys:
        raise ValueError(
            f"{keys} keys are {-(-keys // CHUNK)} chunks of {CHUNK}, and Tender was calibrated on {bias.shape[1]}: "
            "calibrate with longer windows"
        )
    right = right_operand(key.flatten(0, 1) - spread[:, :keys], operand, accumulator)
    assert left.bias is not None
    # Queries of a key head are stacked, so that keys aren't repeated.
    stacked = left.exact.reshape(batch * key_heads, -1, size)
    found, _ = products(stacked, bias.mT, _FLOAT32)
    own, _ = products(left.bias, key.flatten(0, 1).mT, _FLOAT32)
    biases = ScoreBiases(own.view(batch, heads, -1, keys), found.view(batch, heads, queries, -1))
    return left, right, biases


def _usable(bias: Tensor) -> Tensor:
    """A bias, 0 where it isn't finite."""
    return torch.where(bias.isfinite(), bias, 0.0)


def _repeated(ranges: Ranges, batch: int) -> Ranges:
    """The same ranges for each sample of a batch."""
    return Ranges(ranges.low.repeat(batch, 1, 1), ranges.high.repeat(batch, 1, 1))
