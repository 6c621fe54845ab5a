"""The operands of attention scores: transformed, then stored; what recomputation reads; what a row's scores lack."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.low_operands import LowOperand, LowSums, low_products, right_operand
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.quantise import quantise
from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.chain import change_operands, fit, moments_of
from torchlamp.arithmetic.transforms.headwise import Headwise, own_keys
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.simulation.score_biases import ScoreBiases, ScoreRanges, biased

_FLOAT32_SUMS = Accumulator.parse("fp32")
#: Statistics of a layer's queries and keys, (key heads, size) each, calibrated on a text.
ScoreMoments = tuple[Moments, Moments]


@dataclass(frozen=True, eq=False)
class ScoreOperands:
    """What the scores of an attention call are formed of.

    Attributes
    ----------
    query, key : Tensor
        float32 (batch, heads, queries, size) and (batch, key heads, keys, size): the operands of the low pass. With
        `headwise` there are as many key heads as heads.
    exact_query, exact_key : Tensor
        The same representative in full, which recomputed scores are formed of; the same tensors where nothing is
        quantised.
    shift : Tensor or None
        float32 (batch, heads, queries): what all scores of a row lack. A softmax alone doesn't see it.
    column_shift : Tensor or None
        float32 (batch, heads, keys): what all scores of a key lack.
    low_query, low_key : LowOperand or None
        The operands of the low pass with their integers, (batch * heads, queries, size) and (batch * key heads, keys,
        size), where an integer register sums them or Tender biases them; None: `query` and `key` are all.
    biases : ScoreBiases or None
        What the sums of biased operands lack.
    """

    query: Tensor
    key: Tensor
    exact_query: Tensor
    exact_key: Tensor
    shift: Tensor | None = None
    column_shift: Tensor | None = None
    low_query: LowOperand | None = None
    low_key: LowOperand | None = None
    biases: ScoreBiases | None = None

    def lacking(self, sample: int, rows: slice, keys: slice) -> Tensor | None:
        """What scores of these rows and keys lack, float32 broadcastable to (heads, rows, keys); None: nothing."""
        row = None if self.shift is None else self.shift[sample, :, rows, None]
        column = None if self.column_shift is None else self.column_shift[sample, :, None, keys]
        if row is None or column is None:
            return column if row is None else row
        return row + column

    @property
    def is_quantised(self) -> bool:
        """Whether the low pass has coarser operands than the recomputation."""
        return self.query is not self.exact_query or self.key is not self.exact_key

    def quantisation_error(self, sample: int, rows: slice, keys: slice, scaling: float) -> Tensor | None:
        """Expected error of scores that coarser operands make, float32 (heads, rows, keys); None: there is none.

        q'.k' - q.k is q.dk + dq.k to first order. With the residuals' directions taken as random it has the variance
        (|q|^2 |dk|^2 + |dq|^2 |k|^2) / size, times the scaling squared.
        """
        if not self.is_quantised:
            return None
        query, key = self.exact_query[sample, :, rows], self.exact_key[sample, :, keys]
        if self.low_query is not None and self.low_key is not None:
            query = self.low_query.exact.view(self.query.shape)[sample, :, rows]
            key = self.low_key.exact.view(self.key.shape)[sample, :, keys]
        group = query.shape[0] // key.shape[0]
        left = (query - self.query[sample, :, rows]).square().sum(-1, keepdim=True)
        right = (key - self.key[sample, :, keys]).square().sum(-1).repeat_interleave(group, 0)[:, None]
        lengths = key.square().sum(-1).repeat_interleave(group, 0)[:, None]
        squares: Tensor = query.square().sum(-1, keepdim=True) * right + left * lengths
        return squares.mul_(scaling * scaling / query.shape[-1]).sqrt_()

    def low_scores(
        self,
        sample: int,
        rows: slice,
        keys: slice,
        call: "LowPass",
        *,
        causal: int | None = None,
        squares: bool,
    ) -> LowSums:
        """Scores of the low pass, float32 (heads, rows, keys), scaled; keywords as `products` has them."""
        if self.low_query is None or self.low_key is None:
            query, key = self.query[sample, :, rows], self.key[sample, :, keys]
            left, right = LowOperand(query, query), LowOperand(key, key)
        else:
            heads, key_heads = self.query.shape[1], self.key.shape[1]
            left = self.low_query.batches(slice(sample * heads, (sample + 1) * heads))[rows]
            right = self.low_key.batches(slice(sample * key_heads, (sample + 1) * key_heads))[keys]
        low = low_products(
            left, right, call.accumulator, scaling=call.scaling, causal=causal, squares=squares
        )
        if self.biases is None:
            return low
        return replace(low, sums=low.sums + self.biases.products(sample, rows, keys) * call.scaling)


class LowPass(Protocol):
    """How the low pass of scores is summed; `AttentionCall` is one."""

    @property
    def accumulator(self) -> Accumulator:
        """What sums the products."""

    @property
    def scaling(self) -> float:
        """Factor of the scores."""


@torch.no_grad()
def score_operands(
    query: Tensor,
    key: Tensor,
    *,
    operand: Operand,
    transforms: Sequence[Transform],
    scaling: float,
    wants_shift: bool,
    accumulator: Accumulator = _FLOAT32_SUMS,
    moments: ScoreMoments | None = None,
    ranges: ScoreRanges | None = None,
) -> ScoreOperands:
    """The operands of scores, transformed and then quantised.

    Each sample and key head has a representative of its own, fitted to the call's own queries and keys unless
    calibrated statistics are given.

    Parameters
    ----------
    query, key : Tensor
        float32 (batch, heads, queries, size) and (batch, key heads, keys, size).
    operand : Operand
        How both are stored in the low pass.
    transforms : sequence of Transform
        In the order they are applied.
    scaling : float
        Factor of the scores, and so of their shift.
    wants_shift : bool
        Whether what follows sees a shift of a row: a softcap or sinks.
    accumulator : Accumulator
        What sums them; `sort` minds after how many terms it adds its sums to float32 ones.
    moments : pair of Moments, optional
        Calibrated statistics of queries and keys.
    ranges : pair of Ranges, optional
        Calibrated ranges of them, for Tender's operand.

    Raises
    ------
    ValueError
        A head size that a transform can't change, `headwise` with calibrated ranges.
    """
    shift = column_shift = None
    if Headwise() in transforms:
        if ranges is not None:
            raise ValueError(
                "transform 'headwise': Tender's calibrated ranges are those of shared keys; leave it out"
            )
        key = own_keys(query, key)
    exact_query, exact_key = query, key
    if transforms and 0 not in (*query.shape, *key.shape):
        left, right = query.flatten(0, 1), key.flatten(0, 1).mT
        known = moments_of(left, right, transforms) if moments is None else _repeated(moments, len(key))
        changed = change_operands(fit(transforms, *known, promote=accumulator.promote), left, right)
        exact_query, exact_key = changed.left.view(query.shape), changed.right.mT.reshape(key.shape)
        if changed.row_shift is not None and wants_shift:
            shift = (changed.row_shift[..., 0] * scaling).view(query.shape[:3])
        if changed.column_shift is not None:
            column_shift = (changed.column_shift[:, 0] * scaling).view(*query.shape[:2], key.shape[2])
    if operand.is_float32 or 0 in (*query.shape, *key.shape):
        return ScoreOperands(exact_query, exact_key, exact_query, exact_key, shift, column_shift)
    if not operand.is_tender and accumulator.register is None:
        low_query, low_key = quantise(exact_query, operand), quantise(exact_key, operand)
        return ScoreOperands(low_query, low_key, exact_query, exact_key, shift, column_shift)
    biases = None
    if operand.is_tender:
        low_q, low_k, biases = biased(exact_query, exact_key, operand, accumulator, ranges)
    else:
        low_q = right_operand(exact_query.flatten(0, 1), operand, accumulator)
        low_k = right_operand(exact_key.flatten(0, 1), operand, accumulator)
    values = low_q.values.view(query.shape), low_k.values.view(key.shape)
    return ScoreOperands(*values, exact_query, exact_key, shift, column_shift, low_q, low_k, biases)


def _repeated(moments: ScoreMoments, batch: int) -> ScoreMoments:
    """The same statistics for each sample of a batch."""
    return moments[0].repeated(batch), moments[1].repeated(batch)
