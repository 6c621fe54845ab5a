"""Attention over stored keys and values: what a step of decoding reads, for all rows of a window at once.

`torchlamp.kernels.reference_decoding.attend` is the same for one step of a prepared model; docs/decoding.md derives
the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.transforms import Change, Transform
from torchlamp.arithmetic.transforms.center import Center, Centred
from torchlamp.arithmetic.transforms.chain import change_rows, fit, moments_of
from torchlamp.arithmetic.transforms.headwise import Headwise, own_keys
from torchlamp.kernels.constants import SKIP, SURPRISE, VANISHED
from torchlamp.kernels.products import products
from torchlamp.kernels.recompute import recompute
from torchlamp.rules.answers import Answer
from torchlamp.rules.rule import Rule
from torchlamp.rules.tile import Tile
from torchlamp.simulation.softmax import capped_logits, visible_softmax
from torchlamp.simulation.stored import FLOAT32, residual_norms, rounded_vectors, stored_values
from torchlamp.simulation.stored_tile import StoredTile


@dataclass(frozen=True)
class StoredKeys:
    """The stored keys of one sample; sums run over a head's numbers.

    Attributes
    ----------
    low : Tensor
        float32 (key heads, keys, size): what the copies stand for, of keys less the mean, and rotated.
    errors : Tensor
        float32 (key heads, keys): norms of what the copies leave out.
    changes : tuple of Change
        What the keys went through before they were stored, and queries go through.
    column_shift : Tensor or None
        float32 (key heads, 1, keys): what all scores of a key lack after the changes.
    """

    low: Tensor
    errors: Tensor
    changes: tuple[Change, ...] = ()
    column_shift: Tensor | None = None

    @classmethod
    def store(cls, key: Tensor, operand: Operand, changes: Sequence[Change] = ()) -> "StoredKeys":
        """Store keys float32 (key heads, keys, size)."""
        moved, lacking = key, None
        for change in changes:
            added = change.column_shift(moved.mT)
            if added is not None:
                lacking = added if lacking is None else lacking + added
            moved = change.right(moved.mT).mT
        low = stored_values(moved, operand)
        return cls(low, residual_norms(moved, low), tuple(changes), lacking)

    def scores(self, query: Tensor, first: int, last: int, scaling: float) -> tuple[Tensor, Tensor]:
        """Scores of the keys first to last from their copies, and the standard deviations of their errors.

        The error of a score is q.d times the scaling, d the residual of the key, of norm e and of a direction taken as
        random: its standard deviation is r = |scaling| |q| e / sqrt(size).

        Parameters
        ----------
        query : Tensor
            float32 (heads, rows, size).
        first, last : int
            The keys.
        scaling : float
            Factor of the scores.

        Returns
        -------
        float32 (heads, rows, last - first) each.
        """
        heads, _, size = query.shape
        group = heads // self.low.shape[0]
        moved, shift = change_rows(self.changes, query)
        low = self.low[:, first:last].transpose(1, 2)
        scores, _ = products(rounded_vectors(moved), low, FLOAT32, scaling=scaling)
        if shift is not None:
            scores += shift * scaling  # what the mean takes from all scores of a row, given back
        if self.column_shift is not None:
            scores += (self.column_shift[..., first:last] * scaling).repeat_interleave(group, dim=0)
        lengths: Tensor = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        errors = self.errors[:, None, first:last].repeat_interleave(group, dim=0)
        return scores, errors * (lengths * (abs(scaling) / size**0.5))


@dataclass(frozen=True)
class KeyStorage:
    """How an attention call reads its keys: from copies in an operand, the scores that its rule picks in full.

    The keys are changed by `transforms` first, which `mean`, float32 (batch, key heads, size), is the mean of `center`
    for; all others are fitted to the call's own queries and keys.
    """

    operand: Operand
    transforms: tuple[Transform, ...] = ()
    mean: Tensor | None = None

    def store(self, query: Tensor, key: Tensor, sample: int) -> StoredKeys:
        """The stored keys of one sample, from float32 (heads, queries, size) and (key heads, keys, size)."""
        if Headwise() in self.transforms:
            key = own_keys(query[None], key[None])[0]
        columns = key.mT
        left, right = moments_of(query, columns, self.transforms)
        changes: list[Change] = []
        for transform in self.transforms:
            if isinstance(transform, Center) and self.mean is not None:
                mean = self.mean[sample]
                change: Change = Centred(mean.repeat_interleave(len(key) // len(mean), 0), "right")
            else:
                (change,) = fit([transform], left, right)
            left, right = change.moments(left, right)
            changes.append(change)
        return StoredKeys.store(key, self.operand, changes)


class Weighed(NamedTuple):
    """Probabilities of a tile, (heads, rows, keys) each; `visible` can have 1 head.

    `probabilities` are those after recomputation; `known` is the same over the sum of exponentials before it, the one
    that there is when values are chosen. `misled` (heads, rows, 1) are rows that are done again in full precision,
    because recomputation changed them by more than their low-bit scores could tell. None: no difference, no row.
    `overflowed` visible scores didn't fit an integer register.
    `tiles` int64 are the counts of an online softmax (`tile_counts`).
    """

    probabilities: Tensor
    visible: Tensor
    chosen: Tensor
    known: Tensor | None = None
    misled: Tensor | None = None
    overflowed: int = 0
    tiles: Tensor | None = None


#: From the probabilities of a tile and whether to look as far as the residual stream, how far each value is from the
#: output: float32 (heads, rows, keys).
Distances = Callable[[Tensor, bool], Tensor]


@dataclass(frozen=True)
class Softmax:
    """What stands between scores and probabilities."""

    softcap: float | None = None
    #: float32 (heads or 1, rows, keys), added to the logits after the softcap.
    bias: Tensor | None = None
    #: float32 (heads,): a logit per head that enters the normaliser only.
    sinks: Tensor | None = None


def weigh(
    scores: Tensor, error: Tensor, query: Tensor, keys: Tensor, visible: Tensor, softmax: Softmax, *,
    rule: Rule, scaling: float, generator: torch.Generator | None = None, layer: int = 0,
    distances: Distances | None = None, observe: Callable[[Tile, Tensor], None] | None = None,
) -> Weighed:  # fmt: skip
    """Look ahead from low-bit scores, and recompute what matters from full-precision keys.

    Scores that aren't finite are recomputed whatever the rule says.

    Parameters
    ----------
    scores, error : Tensor
        As `StoredKeys.scores` gives them.
    query, keys : Tensor
        float32 (heads, rows, size) and (key heads, size, keys), full precision.
    visible : Tensor
        bool (heads or 1, rows, keys).
    softmax : Softmax
        Softcap, bias and sinks.
    rule, scaling, generator, layer
        As for an attention call.
    distances : callable, optional
        For rules that look through the values.
    observe : callable, optional
        Called with the tile and what is chosen.
    """
    shown = visible.expand(scores.shape)
    odd = ~scores.isfinite() & shown
    low = scores.clone()
    if bool(odd.any()):
        recompute(low, query, keys, odd, scaling)
    logits, slope = capped_logits(low, softmax.softcap, softmax.bias)
    hidden = ~visible
    z = visible_softmax(logits, hidden, softmax.sinks)

    def exact() -> Tensor:
        return products(query, keys, FLOAT32, scaling=scaling)[0][None]

    def distance(ahead: bool) -> Answer:
        return None if distances is None else (lambda: distances(z, ahead)[None])

    tile = StoredTile(
        scores=scores[None],
        logits=logits[None],
        probabilities=z[None],
        visible=shown[None],
        slope=None if slope is None else slope[None],
        error=error[None],
        generator=generator,
        exact=exact,
        bridge_error=error[None],
        distance=distance(True),
        output_distance=distance(False),
        layer=layer,
    )
    chosen = rule.select(tile)[0] | odd
    if observe is not None:
        observe(tile, chosen[None])
    better = logits
    if bool(chosen.any()):
        again = low.clone()
        recompute(again, query, keys, chosen, scaling)
        better, _ = capped_logits(again, softmax.softcap, softmax.bias)
    known, misled = _after(logits, better, hidden, softmax.sinks)
    if bool(misled.any()):
        chosen = torch.where(misled, shown, chosen)
        recompute(low, query, keys, chosen, scaling)
        better, _ = capped_logits(low, softmax.softcap, softmax.bias)
    return Weighed(visible_softmax(better, hidden, softmax.sinks), visible, chosen, known, misled)


def _after(before: Tensor, after: Tensor, hidden: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """e^(logit after recomputation) over the sum of e^(logits before it), and which rows were misled."""
    low, better = (y.masked_fill(hidden, -torch.inf) for y in (before, after))
    top = low.amax(dim=-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.view(-1, 1, 1))
    top = top.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
    terms = torch.exp(better - top)
    sums = [torch.exp(low - top).sum(dim=-1, keepdim=True), terms.sum(dim=-1, keepdim=True)]
    if sinks is not None:
        sums = [total + torch.exp(sinks.view(-1, 1, 1) - top) for total in sums]
    misled = ((better - top) > SURPRISE).any(dim=-1, keepdim=True) | (sums[1] < VANISHED * sums[0])
    return terms / sums[0].masked_fill(sums[0] == 0, 1.0), misled


@dataclass(frozen=True)
class StoredValues:
    """How an attention call reads stored values: which operand, and the rule that picks those read in full.

    The rule sees the probabilities, as a softmax tile; a value is read in full for all heads of its group if it picks
    it for one of them.
    """

    operand: Operand
    rule: Rule
    #: For random rules, on the CPU; every sample starts from the state it has at the call.
    generator: torch.Generator | None = None
    layer: int = 0

    def stored(self, value: Tensor) -> Tensor:
        """The numbers that stored values float32 (key heads, keys, value size) stand for; groups run along the size."""
        return stored_values(value, self.operand)


def stored_sums(weighed: Weighed, value: Tensor, low: Tensor, how: StoredValues) -> tuple[Tensor, Tensor]:
    """Sums of values weighted by probabilities, from the copy or from the full-precision value.

    A copy is left out where its probability is at most `SKIP` over the number of keys that the row sees: together less
    than `SKIP` of the row. Values of a sample that aren't all finite are read in full.

    Parameters
    ----------
    weighed : Weighed
        Of a tile of one sample, (heads, rows, keys).
    value, low : Tensor
        float32 (key heads, keys, value size): in full precision, and what the copies stand for.
    how : StoredValues
        The rule.

    Returns
    -------
    float32 (heads, rows, value size), and the values read in full, int64 (key heads, rows).
    """
    z = weighed.probabilities
    known = z if weighed.known is None else weighed.known
    heads, rows, keys = z.shape
    groups = value.shape[0]
    shown = weighed.visible.expand(z.shape)
    logits = known.log()
    tile = Tile(
        scores=logits.nan_to_num(neginf=torch.finfo(torch.float32).min)[None],
        logits=logits[None],
        probabilities=known[None],
        visible=shown[None],
        generator=how.generator,
        layer=how.layer,
    )
    picked = how.rule.select(tile)[0] if bool(value.isfinite().all()) else shown
    large = picked & ~(z <= 0)
    shared = large.view(groups, heads // groups, rows, keys).any(dim=1)
    large = shared.repeat_interleave(heads // groups, dim=0)
    tiny = known <= SKIP / shown.sum(dim=-1, keepdim=True)
    counts = shared.sum(dim=-1)
    full = large if weighed.misled is None else large | weighed.misled
    short = torch.where(full | tiny, 0.0, z)
    out = apply(short, low.nan_to_num(0.0))
    if bool(full.any()):
        out += apply(torch.where(full, z, 0.0), value)
    return out, counts


def apply(weights: Tensor, value: Tensor) -> Tensor:
    """Weighted sums (heads, rows, value size); the queries of a group are stacked, so that values aren't repeated."""
    heads, rows, keys = weights.shape
    groups = value.shape[0]
    stacked = weights.reshape(groups, heads // groups * rows, keys)
    return torch.matmul(stacked, value).reshape(heads, rows, value.shape[-1])
