"""Folding inside the sublayers: queries and keys, values and their projection, the hidden neurons of an MLP."""

from collections.abc import Sequence

from torch import Tensor, nn

from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Diagonal
from torchlamp.huggingface.folding.chain import (
    blocks,
    change_consumer,
    change_keys,
    change_producer,
    fitted,
    summed,
)
from torchlamp.huggingface.folding.pairs import fit_pairs
from torchlamp.huggingface.folding.parts import (
    Attention,
    Outputs,
    by_heads,
    reorder,
    split,
    spread,
    weight_of,
)


def fold_scores(
    attention: Attention, transforms: Sequence[Transform], left: Moments, right: Moments, is_rotary: bool
) -> None:
    """Change the projections of queries and keys; moments (key heads, size) as the scores multiply them."""
    if is_rotary:
        fit_pairs(transforms, left, right, attention.norms is not None).apply(attention)
        return
    changes, _, _ = fitted(transforms, left, right, "right")
    heads, key_heads, bias = attention.heads, attention.key_heads, attention.query.bias
    change_producer(
        changes, by_heads(attention.query.weight, heads), None if bias is None else bias.view(heads, -1)
    )
    columns, bias = by_heads(attention.key.weight, key_heads).mT, attention.key.bias
    own = columns.new_zeros(columns.shape[:2]) if bias is None else bias.view(key_heads, -1)
    change_keys(changes, columns, own)


def fold_values(attention: Attention, transforms: Sequence[Transform], inputs: Moments) -> None:
    """Change the projections of values and of the heads' outputs; moments (1, heads * value size) of its inputs.

    Heads that share their values share a change, fitted to the inputs and weights of all of them. `sort` then puts the
    heads of a group, and the groups, in ascending order, too: with them go their queries and keys.
    """
    groups, group = attention.key_heads, attention.group
    weight = weight_of(attention.out)
    # (groups, value size, heads of a group * outputs)
    columns = split(weight.T, 0, groups, group, -1)
    right = Moments.of(columns.transpose(2, 3).flatten(1, 2), any(t.needs_products for t in transforms))
    by_head = blocks(inputs, attention.heads)
    together = summed(by_head, group)
    if any(transform.name == "center" for transform in transforms):
        by_head = by_head.centred(together.mean.repeat_interleave(group, 0))
    energies = (by_head.energy * Moments.of(columns.flatten(0, 1).mT).energy).sum(1)
    changes, _, _ = fitted(transforms, together, right, "left")
    bias = attention.value.bias
    change_producer(
        changes, by_heads(attention.value.weight, groups), None if bias is None else bias.view(groups, -1)
    )
    flat = columns.transpose(1, 2).flatten(2).clone()
    shift = change_consumer(changes, flat)
    columns.copy_(split(flat, 2, group, -1).transpose(1, 2))
    if shift is not None:
        out_bias = Outputs.all_of(attention.out).bias
        assert out_bias is not None
        out_bias.add_(split(shift, 1, group, -1).sum((0, 1)))
    if any(transform.name == "sort" for transform in transforms):
        _sort_heads(attention, energies.view(groups, group))


def _sort_heads(attention: Attention, energies: Tensor) -> None:
    """Put groups of heads, and the heads in each, into ascending order of the energy of their terms (groups, group)."""
    weight, group = weight_of(attention.out), attention.group
    within = energies.argsort(dim=1, stable=True)
    among = energies.sum(1).argsort(stable=True)
    heads = (among[:, None] * group + within[among]).flatten()
    for part, order, size in (
        (attention.query, heads, attention.size),
        (attention.key, among, attention.size),
        (attention.value, among, attention.value_size),
    ):
        rows = spread(order, size)
        reorder(part.weight, rows, 0)
        if part.bias is not None:
            reorder(part.bias, rows, 0)
    reorder(weight, spread(heads, attention.value_size), 1)


def fold_neurons(
    ups: list[nn.Module],
    is_gated: bool,
    down: nn.Module,
    transforms: Sequence[Transform],
    inputs: Moments,
    promote: int,
) -> None:
    """Change the hidden neurons of an MLP: an order for all of them, factors through the half that isn't the gate."""
    columns = weight_of(down).T[None]
    changes, _, _ = fitted(transforms, inputs, Moments.of(columns.mT), "left", promote)
    parts = [Outputs.all_of(up) for up in ups]
    if is_gated and len(parts) == 1:
        half = parts[0].last // 2
        parts = [Outputs(ups[0], 0, half), Outputs(ups[0], half, 2 * half)]
    gate = parts[:-1] if is_gated else []
    orders = [Diagonal(c.order) for c in changes if isinstance(c, Diagonal) and c.order is not None]
    for part in parts:
        bias: Tensor | None = None if part.bias is None else part.bias[None]
        change_producer(orders if part in gate else changes, part.weight.T[None], bias)
    change_consumer(changes, columns)
