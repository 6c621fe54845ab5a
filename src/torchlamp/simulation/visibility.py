"""Which keys a query sees: masks of every form, brought into one and sliced for a tile of query rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """What the mask argument of an attention call says.

    Attributes
    ----------
    mask : Tensor or None
        bool (batch or 1, heads or 1, queries, keys), True where the query may see the key; None hides
        nothing.
    causal : bool
        Query i sees only keys 0..i, counted from the first key (and only where `mask` allows).
    bias : Tensor or None
        float32, broadcastable like `mask`, added to the logits.
    """

    mask: Tensor | None = None
    causal: bool = False
    bias: Tensor | None = None

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """Refuse what doesn't fit an attention call of `shape` (batch, heads, queries, keys).

        Raises
        ------
        TypeError
            A mask that isn't bool, or a bias that isn't float32.
        ValueError
            A shape that isn't (batch or 1, heads or 1, queries, keys).
        """
        for name, tensor, dtype in (("mask", self.mask, torch.bool), ("bias", self.bias, torch.float32)):
            if tensor is None:
                continue
            if tensor.dtype != dtype:
                raise TypeError(f"{name} is {tensor.dtype}: it must be {dtype}")
            outer_fit = (
                tensor.ndim == 4 and tensor.shape[0] in (1, shape[0]) and tensor.shape[1] in (1, shape[1])
            )
            if not outer_fit or tensor.shape[2:] != shape[2:]:
                raise ValueError(
                    f"{name} of shape {tuple(tensor.shape)}: it must be (batch or 1, heads or 1, queries, keys) "
                    f"of {shape}"
                )


@dataclass(frozen=True)
class Window:
    """The keys first..last-1 that any row of a tile sees, and which of them each row sees.

    `visible` is bool (heads or 1, rows, last - first), or None where every row sees the whole range.
    """

    first: int
    last: int
    visible: Tensor | None


def visibility(
    attention_mask: Tensor | None, *, shape: tuple[int, int, int, int], causal: bool
) -> Visibility:
    """Bring a mask into one form.

    Parameters
    ----------
    attention_mask : Tensor or None
        None; bool with True = visible; or float, added to the logits, where the most negative number of its
        dtype (anything below half of it) hides. Broadcastable to `shape`.
    shape : tuple of int
        (batch, heads, queries, keys) of the attention call.
    causal : bool
        What None means for more than one query: causal, aligned at the first key (so that the unused end of a
        preallocated cache stays hidden). One query sees every key.

    Raises
    ------
    TypeError
        A mask that isn't a bool or float tensor.
    ValueError
        A mask that doesn't broadcast to `shape`.
    """
    if attention_mask is None:
        return Visibility(causal=causal and shape[2] > 1)
    if not isinstance(attention_mask, Tensor):
        given = type(attention_mask).__name__
        raise TypeError(f"attention mask of type {given}: pass None, or a bool or float tensor")
    mask = _four_dimensional(attention_mask, shape)
    if mask.dtype == torch.bool:
        return Visibility(mask=mask)
    if not mask.dtype.is_floating_point:
        raise TypeError(f"attention mask of dtype {mask.dtype}: pass bool (True = visible) or float (added)")
    visible = mask > torch.finfo(mask.dtype).min / 2
    bias = None
    if bool(((mask != 0) & visible).any()):
        bias = mask.float().masked_fill(~visible, 0.0)
    return Visibility(mask=visible, bias=bias)


def window(seen: Visibility, sample: int, rows: range, keys: int, device: torch.device) -> Window:
    """Find the key range of one sample's tile; first = last = 0 where its rows see nothing.

    Parameters
    ----------
    seen : Visibility
        Of the whole call.
    sample : int
        Index into the batch.
    rows : range
        The tile's query rows.
    keys : int
        Number of keys of the call.
    device : torch.device
        Where the tile is.
    """
    end = min(keys, rows.stop) if seen.causal else keys
    first, visible = 0, None
    if seen.mask is not None:
        own = seen.mask[sample if seen.mask.shape[0] > 1 else 0]
        visible = own[:, rows.start : rows.stop, :end]
        columns = torch.nonzero(visible.flatten(0, -2).any(dim=0))
        if columns.numel() == 0:
            return Window(0, 0, None)
        first, end = int(columns[0]), int(columns[-1]) + 1
        visible = visible[..., first:end]
    if seen.causal and end > rows.start + 1:
        diagonal = torch.arange(rows.start, rows.stop, device=device)[:, None]
        below = torch.arange(first, end, device=device)[None, :] <= diagonal
        visible = below[None] if visible is None else visible & below
    return Window(first, end, visible)


def _four_dimensional(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    fits = mask.ndim == 4 and all(have in (1, want) for have, want in zip(mask.shape, shape, strict=True))
    if not fits:
        raise ValueError(
            f"attention mask of shape {tuple(mask.shape)}: it must broadcast to "
            f"(batch, heads, queries, keys) = {shape}"
        )
    return mask.expand(-1, -1, shape[2], shape[3])
