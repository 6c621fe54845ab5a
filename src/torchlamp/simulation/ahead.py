"""What follows the softmax: how far an error in a score moves the head's output, or the residual stream.

To first order do = z_j (v_j - o) dy_j, so what counts of a key is the distance of its value from the output
(docs/method.md 4.9).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Ahead:
    """The linear map after the heads' outputs, and what its result is measured against.

    Attributes
    ----------
    factor : Tensor
        float32 (heads, value size, value size): L_h with L_h L_h^T = W_h^T W_h, so that ||W_h x|| = ||L_h^T x||, W_h
        the block of the output projection (times what follows it) that belongs to head h.
    scale : callable
        From the outputs float32 (heads, rows, value size) of some rows, the number of the sample and the rows to
        float32 (rows,), > 0: the norm that changes are relative to.
    reads_outputs : bool
        Whether the scale looks at the outputs it is given.
    """

    factor: Tensor
    scale: Callable[[Tensor, int, range], Tensor]
    reads_outputs: bool = True

    def scale_of(self, outputs: Tensor, sample: int, rows: range) -> Tensor:
        """The scale of some rows, float32 (rows,), kept from 0 as a divisor."""
        return self.scale(outputs, sample, rows).clamp_min(_TINY)

    def mapped(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """L_h^T v of the values (key heads, keys, value size) for every query head, and its squared norm.

        Returns
        -------
        float32 (heads, keys, value size) and (heads, keys).
        """
        repeated = value.repeat_interleave(self.factor.shape[0] // value.shape[0], dim=0)
        mapped = torch.matmul(repeated, self.factor)
        return mapped, mapped.square().sum(dim=-1)


def gram_factor(weight: Tensor, heads: int) -> Tensor:
    """`Ahead.factor` of an output projection: a square root of each head's Gram matrix, formed in float64.

    Parameters
    ----------
    weight : Tensor
        (features, heads * value size): row i gives output i.
    heads : int
        Number of query heads.

    Returns
    -------
    float32 (heads, value size, value size).
    """
    blocks = weight.detach().double().view(weight.shape[0], heads, -1).permute(1, 2, 0)
    values, vectors = torch.linalg.eigh(blocks @ blocks.transpose(1, 2))
    root: Tensor = vectors * values.clamp_min(0).sqrt()[:, None, :]
    return root.float()


class Distances:
    """||v_j - o|| / scale for the tiles of one sample; the values are projected once.

    Parameters
    ----------
    value : Tensor
        float32 (key heads, keys, value size).
    heads : int
        Number of query heads.
    ahead : Ahead or None
        None: no map, relative to the output itself.
    """

    def __init__(self, value: Tensor, heads: int, ahead: Ahead | None) -> None:
        self._ahead = ahead
        if ahead is not None:
            self._value, self._squares = ahead.mapped(value)
        else:
            self._value = value
            self._squares = value.square().sum(dim=-1).repeat_interleave(heads // value.shape[0], dim=0)

    def of(
        self, probabilities: Tensor, outputs: Tensor, first: int, last: int, sample: int, rows: range
    ) -> Tensor:
        """Distances of the keys first to last.

        Parameters
        ----------
        probabilities, outputs : Tensor
            float32 (heads, rows, keys) and (heads, rows, value size): from the low pass, and the sums of the values
            under them.
        first, last, sample, rows
            The tile's keys, its sample and rows in the call.

        Returns
        -------
        float32 (heads, rows, keys).
        """
        heads, count, _ = outputs.shape
        mapped = outputs if self._ahead is None else torch.matmul(outputs, self._ahead.factor)
        value, squares = self._value[:, first:last], self._squares[:, None, first:last]
        stacked = mapped.reshape(value.shape[0], -1, mapped.shape[-1])
        cross = torch.matmul(stacked, value.transpose(1, 2)).view(heads, count, -1)
        own = mapped.square().sum(dim=-1, keepdim=True)
        distance = (squares - 2 * cross + own).clamp_min_(0).sqrt_()
        # ||v||^2 - 2 v.o + ||o||^2 is all rounding error where one key has nearly all the weight and so v is nearly o.
        # But v_j - o = (1 - z_j) v_j - sum of the other z_k v_k, whose norm is at most what the norms add up to.
        norms = squares.sqrt()
        shares = probabilities * norms
        others = (shares.sum(dim=-1, keepdim=True) - shares).clamp_min_(0)
        distance = torch.minimum(distance, torch.addcmul(others, 1 - probabilities, norms))
        if self._ahead is None:
            return distance / own.sqrt().clamp_min(_TINY)
        return distance / self._ahead.scale_of(outputs, sample, rows).view(1, -1, 1)


class SampleDistances:
    """The `Distances` of one sample, made when they are first asked for.

    Parameters
    ----------
    value, heads, ahead
        As for `Distances`.
    """

    def __init__(self, value: Tensor, heads: int, ahead: Ahead | None) -> None:
        self._value, self._heads, self._ahead = value, heads, ahead

    @cached_property
    def output(self) -> Distances:
        """Relative to the head's output."""
        return Distances(self._value, self._heads, None)

    @cached_property
    def ahead(self) -> Distances:
        """Through `ahead`, relative to its scale."""
        return Distances(self._value, self._heads, self._ahead)


def bridge_error(query: Tensor, keys: Tensor, scores: Tensor, scaling: float, unit_roundoff: float) -> Tensor:
    """The error estimate of `torchlamp.rules.Bridge`, made of the scores and the norms of queries and keys.

    Parameters
    ----------
    query, keys : Tensor
        float32 (heads, rows, size) and (key heads, size, keys).
    scores : Tensor
        float32 (heads, rows, keys), scaled.
    scaling, unit_roundoff : float
        Of the scores and of the accumulator's format.

    Returns
    -------
    float32 (heads, rows, keys).
    """
    size = query.shape[-1]
    key_squares = keys.square().sum(dim=1).repeat_interleave(query.shape[0] // keys.shape[0], dim=0)
    products = query.square().sum(dim=-1, keepdim=True) * key_squares[:, None] * (scaling * scaling / 6)
    return (scores.square() * (size / 3) + products).sqrt_().mul_(unit_roundoff / 2)
