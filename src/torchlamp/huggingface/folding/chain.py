"""Changes of a product's operands, applied to the weights that make the left one and to those that read it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlamp.arithmetic.transforms import Change, Transform
from torchlamp.arithmetic.transforms.center import Centred
from torchlamp.arithmetic.transforms.chain import fit
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Side
from torchlamp.huggingface.folding.parts import split


def fitted(
    transforms: Sequence[Transform], left: Moments, right: Moments, side: Side, promote: int = 0
) -> tuple[list[Change], Moments, Moments]:
    """The changes that statistics ask for, and the statistics after all of them."""
    changes = fit(transforms, left, right, side, promote)
    for change in changes:
        left, right = change.moments(left, right)
    return changes, left, right


def blocks(moments: Moments, count: int) -> Moments:
    """Statistics of vectors (1, count * size) as those of each of their blocks, (count, size)."""
    products = None
    if moments.products is not None:
        size = moments.total.shape[1] // count
        whole = moments.products.view(count, size, count, size)
        products = torch.stack([whole[i, :, i] for i in range(count)])
    return Moments(
        moments.count.expand(count), moments.total.view(count, -1), moments.squares.view(count, -1), products
    )


def summed(moments: Moments, times: int) -> Moments:
    """Statistics (groups * times, size) added up over `times` neighbours: (groups, size)."""
    products = moments.products
    return Moments(
        split(moments.count, 0, -1, times).sum(1),
        split(moments.total, 0, -1, times).sum(1),
        split(moments.squares, 0, -1, times).sum(1),
        None if products is None else split(products, 0, -1, times).sum(1),
    )


def change_producer(changes: Sequence[Change], rows: Tensor, bias: Tensor | None) -> None:
    """Change the weights that make a left operand, in place.

    Parameters
    ----------
    changes
        Of one operand for each of Gb groups.
    rows
        (G, inputs, size), a view: what each input adds to the operand, which the linear part of the changes applies to.
    bias
        (G, size), a view, or None: it takes the mean off, too.
    """
    changed = rows.contiguous()
    for change in changes:
        if not isinstance(change, Centred):
            changed = change.left(changed)
    rows.copy_(changed)
    if bias is not None:
        vector = bias[:, None, :].contiguous()
        for change in changes:
            vector = change.left(vector)
        bias.copy_(vector[:, 0])


def change_consumer(changes: Sequence[Change], columns: Tensor) -> Tensor | None:
    """Change the weights that read the left operand, (Gb, size, outputs), a view, in place; the shift (Gb, outputs)."""
    changed, shift = columns.contiguous(), None
    for change in changes:
        added = change.column_shift(changed)
        shift = shift if added is None else added[:, 0]
        changed = change.right(changed)
    columns.copy_(changed)
    return shift


def change_keys(changes: Sequence[Change], columns: Tensor, bias: Tensor) -> None:
    """Change the weights that make a right operand, in place: its mean is taken off the bias alone.

    Parameters
    ----------
    changes
        Of one operand for each of Gb groups.
    columns
        (Gb, size, inputs), a view.
    bias
        (Gb, size), a view.
    """
    changed, vector = columns.contiguous(), bias[:, :, None].contiguous()
    for change in changes:
        vector = change.right(vector)
        if not isinstance(change, Centred):
            changed = change.right(changed)
    columns.copy_(changed)
    bias.copy_(vector[:, :, 0])
