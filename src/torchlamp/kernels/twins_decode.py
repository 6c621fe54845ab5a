"""The torch twins of the decoding kernels: the same layouts, rules and results to float32 accuracy.

Queries are rounded to 16-bit integers with a scale for each group of 32 elements. Multiplying and adding 16-bit
integers costs as many instructions as 8-bit ones do once those are widened, and a query's own rounding error, 2^-16 of
a group's largest element, then never matters.

What is recomputed. A low-bit key k' = k - d gives the score y' = y - scaling q.d. The direction of d is as good as
random, so q.d has mean square |q|^2 |d|^2 / D, and r = |scaling| |q| |d| / sqrt(D), with |d| kept beside each key, is
the expected error of the score: the rule `running` of `torchlamp.rules`, with the quantisation error in the place of
the accumulation error. An error r changes the probabilities by 2 z (1 - z) s r in the l1 norm, s the slope of a
softcap, and a score is recomputed where that exceeds the threshold. The formula is linear in r; where r exceeds a nat
it says nothing, and z counts as what it might be four standard errors higher, 1 - z as 1.

How values are read: in full precision where z exceeds its threshold for any head of a group, not at all where
z <= skip / keys for all of them (together less than `skip` of a row), low-bit otherwise. z is the recomputed e^l over
the sum before recomputation, for the sum after it is known only when all of this is over.

A row whose low-bit scores misled, by more than 60 nats upwards or e^-41 of the total downwards, is done in full.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchlamp.kernels import twins_lowbit
from torchlamp.kernels.decode_types import Attended, Thresholds
from torchlamp.kernels.twins_lowbit import GROUP, ROWS, group_count

if TYPE_CHECKING:
    from torchlamp.kernels.decode import KeyValueArrays  # which imports this module

_SURPRISE, _VANISHED = 60.0, 2.0**-60
_SMALLEST = 2.0**-126
_LARGEST_HALF = 65520.0


@torch.no_grad()
def append(arrays: KeyValueArrays, keys: Tensor, values: Tensor, start: int) -> tuple[bool, bool]:
    """`KeyValueArrays.append`."""
    form, count = arrays.form, keys.shape[2]
    if not count:
        return False, False
    centred = keys if arrays.mean is None else keys - arrays.mean[:, :, None]
    strange, overflow = not bool(values.isfinite().all()), False
    kept = centred if form.centred_copy else keys
    span = slice(start, start + count)
    if form.full == "int16":
        for x, codes, scales in (
            (kept, arrays.full_keys, arrays.full_key_scales),
            (values, arrays.full_values, arrays.full_value_scales),
        ):
            assert scales is not None
            codes[:, :, span], scales[:, :, span] = _integers(x)
    else:
        arrays.full_keys[:, :, span], arrays.full_values[:, :, span] = kept, values
        if form.full == "float16":
            overflow = any(bool((x.isfinite() & (x.abs() >= _LARGEST_HALF)).any()) for x in (kept, values))
    low = rotate(centred) if form.hadamard else centred
    _append_blocks(arrays, low, start)
    codes, scales = twins_lowbit.pack_lines(values.reshape(-1, values.shape[3]), form.value_bits)
    arrays.value_codes[:, :, span] = codes.view(*values.shape[:3], -1)
    arrays.value_scales[:, :, span] = scales.view(torch.int16).view(*values.shape[:3], -1)
    return overflow, strange


def _append_blocks(arrays: KeyValueArrays, keys: Tensor, start: int) -> None:
    """Low-bit copies of keys into blocks whose first lanes may be taken."""
    bits, (batch, heads, count, size) = arrays.form.key_bits, keys.shape
    lanes = -(-count // ROWS) * ROWS  # whole blocks for each head
    padded = torch.nn.functional.pad(keys, (0, 0, 0, lanes - count)).reshape(-1, size)
    codes, scales, errors = twins_lowbit.pack_blocks(padded, bits)
    groups, pairs = group_count(size), group_count(size) * GROUP // 2

    def by_row(x: Tensor, inner: tuple[int, ...]) -> Tensor:
        """(B, H, blocks, inner with the lanes second) as (B, H, blocks, lanes, rest)."""
        return x.view(batch, heads, -1, *inner).transpose(3, 4)

    position = torch.arange(start, start + count, device=keys.device)
    block, lane = position // ROWS, position % ROWS
    for to, new, inner in (
        (arrays.key_codes, codes, (pairs, ROWS, bits // 4)),
        (arrays.key_scales, scales.view(torch.int16), (groups, ROWS)),
    ):
        rows = by_row(new, inner).flatten(2, 3)[:, :, :count]
        by_row(to, inner)[:, :, block, lane] = rows
    own = errors.view(batch, heads, lanes)[:, :, :count]
    arrays.key_errors[:, :, start : start + count] = torch.where(own.isfinite(), own, torch.nan)


@torch.no_grad()
def full(arrays: KeyValueArrays, first: int, last: int) -> tuple[Tensor, Tensor]:
    """`KeyValueArrays.full`."""
    span = slice(first, last)
    keys, values = arrays.full_keys[:, :, span], arrays.full_values[:, :, span]
    if arrays.full_key_scales is not None and arrays.full_value_scales is not None:
        keys = _widen(keys, arrays.full_key_scales[:, :, span])
        values = _widen(values, arrays.full_value_scales[:, :, span])
    keys, values = keys.float(), values.float()
    if arrays.form.centred_copy and arrays.mean is not None:
        keys = keys + arrays.mean[:, :, None]
    return keys, values


@torch.no_grad()
def low(arrays: KeyValueArrays, first: int, last: int) -> tuple[Tensor, Tensor]:
    """What the low-bit copies stand for, as `full` has it; keys without their mean, and rotated if they are."""
    form, capacity = arrays.form, arrays.capacity
    batch, heads, _, size = arrays.full_keys.shape
    value_size = arrays.full_values.shape[3]
    keys = twins_lowbit.unpack_blocks(
        arrays.key_codes.flatten(),
        arrays.key_scales.flatten().view(torch.uint16),
        form.key_bits,
        batch * heads * capacity,
        size,
    )
    values = twins_lowbit.unpack_lines(
        arrays.value_codes.flatten(0, 2),
        arrays.value_scales.flatten(0, 2).view(torch.uint16),
        form.value_bits,
        value_size,
    )
    shape = (batch, heads, capacity)
    return keys.view(*shape, size)[:, :, first:last], values.view(*shape, value_size)[:, :, first:last]


@torch.no_grad()
def attend(
    arrays: KeyValueArrays,
    query: Tensor,
    first: int,
    last: int,
    thresholds: Thresholds,
    scaling: float,
    mask: Tensor | None,
    causal: bool,
    sinks: Tensor | None,
    softcap: float,
    strange: bool,
) -> Attended:
    """`KeyValueArrays.attend`; dimensions below are (batch, key head, head of the group, query, key or element)."""
    batch, heads, queries, size = query.shape
    kv = arrays.full_keys.shape[1]
    q = query.reshape(batch, kv, heads // kv, queries, size)
    keys, values = low(arrays, first, last)
    full_keys, full_values = full(arrays, first, last)
    seen = _visible(query, last - first, mask, causal)[:, None, None]
    sink = None if sinks is None else sinks.view(kv, heads // kv, 1, 1).expand(batch, -1, -1, queries, 1)

    exact = (q @ full_keys[:, :, None].mT) * scaling
    y = (_shorts(rotate(q) if arrays.form.hadamard else q) @ keys[:, :, None].mT) * scaling
    if arrays.mean is not None:
        y = y + (q @ arrays.mean[:, :, None, :, None]) * scaling
    y = torch.where(y.isfinite(), y, exact)
    logits, slope = _cap(y, softcap)
    logits = torch.where(seen, logits, -torch.inf)
    top, total = _normaliser(logits, sink)
    z = (logits - top).exp() / total
    errors = arrays.key_errors[:, :, None, None, first:last]
    r = errors * (abs(scaling) * q.norm(dim=-1, keepdim=True) / math.sqrt(size))
    chosen = seen & ~(look_ahead(z, r, slope) <= thresholds.scores)
    if thresholds.scores == math.inf:
        chosen = torch.zeros_like(chosen)
    again = torch.where(chosen, _cap(exact, softcap)[0], logits)

    e = (again - top).exp()
    after = e.sum(-1, keepdim=True) + (0.0 if sink is None else (sink - top).exp())
    misled = ((again - top > _SURPRISE) & seen).any(-1, keepdim=True) | (after < _VANISHED)
    misled &= seen.any(-1, keepdim=True)
    exact_logits = torch.where(seen, _cap(exact, softcap)[0], -torch.inf)
    exact_top, _ = _normaliser(exact_logits, sink)
    share = (e / total).amax(
        2, keepdim=True
    )  # the largest of a group: a row is read once for all of its heads
    unknown = (e / total).isnan().any(2, keepdim=True)
    wanted = unknown | (share > (0.0 if strange else thresholds.skip / max(1, last - first)))
    large = (unknown | (share > (-1.0 if strange else thresholds.values))) & ((share > 0) | unknown) & seen
    weights = torch.where(wanted | large, e, 0.0)
    output = _sum(weights, large, full_values, values)
    in_full = (exact_logits - exact_top).exp()
    divisor = in_full.sum(-1, keepdim=True) + (0.0 if sink is None else (sink - exact_top).exp())
    everywhere = torch.ones_like(in_full, dtype=torch.bool)
    output = torch.where(misled, _sum(in_full, everywhere, full_values, values) / divisor, output / after)
    blind = (
        full_values.mean(2, keepdim=True)
        if last > first
        else full_values.new_zeros(full_values[:, :, :1].shape)
    )
    blind = torch.zeros_like(blind) if sinks is not None else blind
    output = torch.where(seen.any(-1, keepdim=True), output, blind[:, :, None])

    recomputed = torch.where(misled, seen, chosen).sum(-1).flatten(1, 2).int()
    return _attended(output.flatten(1, 2).transpose(1, 2).contiguous(), recomputed, large, seen)


def _attended(output: Tensor, recomputed: Tensor, large: Tensor, seen: Tensor) -> Attended:
    full_rows, visible = large.sum(-1)[:, :, 0].int(), seen[:, 0, 0].sum(-1).int()
    heads, kv, count = recomputed.shape[1], full_rows.shape[1], int(visible.sum())
    totals = (int(recomputed.sum()), count * heads, int(full_rows.sum()), count * kv)
    counts = torch.cat([recomputed.flatten(), full_rows.flatten(), visible.flatten()])
    return Attended(output, totals, counts)


def look_ahead(z: Tensor, r: Tensor, slope: Tensor | float) -> Tensor:
    """How much the probabilities change, in the l1 norm, if a score of probability z is off by r."""
    high = (z.clamp_min(_SMALLEST) * (r * 4.0).clamp_max(87.0).exp()).clamp_max(1.0)
    return torch.where(r > 1.0, 2.0 * high * r, (1.0 - z) * z * 2.0 * r * slope)


def rotate(x: Tensor) -> Tensor:
    """The last dimension times the normalised Hadamard matrix of its size, a power of two; its own inverse."""
    size, half = x.shape[-1], 1
    while half < size:
        first, second = x.view(*x.shape[:-1], size // (2 * half), 2, half).unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return x / math.sqrt(size)


def _visible(query: Tensor, keys: int, mask: Tensor | None, causal: bool) -> Tensor:
    """Which keys each query sees, bool (batch, queries, keys)."""
    batch, _, queries, _ = query.shape
    seen = torch.ones(batch, queries, keys, dtype=torch.bool, device=query.device)
    if causal:
        seen = seen.tril(keys - queries)
    return seen if mask is None else seen & mask


def _cap(y: Tensor, softcap: float) -> tuple[Tensor, Tensor | float]:
    """The logit of a score, and its derivative."""
    if not softcap:
        return y, 1.0
    t = (y / softcap).tanh()
    return t * softcap, 1.0 - t * t


def _normaliser(logits: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest logit (0 where there is none) and the sum of exponentials (1 where there is none)."""
    everything = logits if sink is None else torch.cat([logits, sink], dim=-1)
    if not everything.shape[-1]:
        return logits.new_zeros(*logits.shape[:-1], 1), logits.new_ones(*logits.shape[:-1], 1)
    top = torch.where(everything.isnan(), -torch.inf, everything).amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    total = (everything - top).exp().sum(-1, keepdim=True)
    return top, torch.where(total == 0, 1.0, total)


def _sum(weights: Tensor, large: Tensor, full_values: Tensor, values: Tensor) -> Tensor:
    """Values by their weights, from the full copy where `large`; a weight of 0 hides a value that isn't finite."""
    total = weights.new_zeros(*weights.shape[:-1], values.shape[-1])
    for some, rows in ((large, full_values), (~large, values)):
        own = torch.where(some, weights, 0.0)
        if bool(rows.isfinite().all()):
            total += own @ rows[:, :, None]
        else:
            terms = own[..., None] * rows[:, :, None, None]
            total += torch.where(own[..., None] == 0, 0.0, terms).sum(-2)
    return total


def _shorts(q: Tensor) -> Tensor:
    """Queries as the 16-bit integers stand for them."""
    codes, scales = twins_lowbit.quantise_vector(q.reshape(-1, q.shape[-1]))
    groups = codes.view(*scales.shape, GROUP).float() * scales[..., None]
    return groups.flatten(1)[:, : q.shape[-1]].view(q.shape)


def _integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """16-bit integers int16 (..., D) and their scales, bfloat16 patterns in int16 (..., groups)."""
    size = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, group_count(size) * GROUP - size))
    groups = groups.view(*x.shape[:-1], group_count(size), GROUP)
    quotient = groups.abs().amax(-1) / 32767.0
    pattern = (quotient.contiguous().view(torch.int32).long() + 0xFFFF) >> 16
    pattern = torch.where(quotient.isfinite() & (pattern < 0x7F80), pattern, 0x7FC0)
    scale = (pattern << 16).to(torch.int32).view(torch.float32)[..., None]
    codes = torch.where(scale > 0, (groups / scale).round().clamp(-32767, 32767), 0.0)
    return codes.flatten(-2)[..., :size].to(torch.int16), pattern.to(torch.int16)


def _widen(codes: Tensor, scales: Tensor) -> Tensor:
    """What 16-bit integers stand for, float32."""
    wide = (scales.to(torch.int32) << 16).view(torch.float32).repeat_interleave(GROUP, dim=-1)
    return codes.float() * wide[..., : codes.shape[-1]]
