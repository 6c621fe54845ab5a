"""Attention under a threshold rule in Triton: scores twice, then values, and no tensor of size queries x keys.

What `torchlamp.kernels.attention.fused_attention` does for the CPU: low-precision scores and their softmax; weights of
the rule; recomputation in float32; softmax and values. The softmax runs online, key block by key block, and its sum
must be known before a weight is, so that low scores are formed in two passes (three for the weight `relaxed`, whose
threshold is a share of the row's largest weight). Scores are equal bit for bit to the CPU's; probabilities to a few
units in the last place, so that an entry whose weight lies that close to the threshold may be decided otherwise.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchlamp.kernels.constants import BLOCK_KEYS, BLOCK_TOUCHED, BLOCK_VISIBLE, RULE_WEIGHTS
from torchlamp.kernels.gpu.launch import device_of, interpreted, launch_options
from torchlamp.kernels.gpu.rounding import INFINITY, grid_numbers, round_to
from torchlamp.kernels.gpu.sums import FLOAT32_FORM, FLOAT32_GRID, form_numbers, tile_sums
from torchlamp.kernels.specification import Accumulation

#: Query rows and keys of a tile. Values are multiplied by `tl.dot`, which wants at least 16 of each.
_ROWS, _KEYS = 16, 64
#: Keys of a row beyond which thresholds by length fall: `torchlamp.rules.ThresholdForm`.
_LENGTH = 1024.0

_STRICT: tl.constexpr = tl.constexpr(RULE_WEIGHTS.index("strict"))
_RELAXED: tl.constexpr = tl.constexpr(RULE_WEIGHTS.index("relaxed"))
_RUNNING: tl.constexpr = tl.constexpr(RULE_WEIGHTS.index("running"))
_TOPZ: tl.constexpr = tl.constexpr(RULE_WEIGHTS.index("topz"))
_BLOCK: tl.constexpr = tl.constexpr(BLOCK_KEYS)
_VISIBLE: tl.constexpr = tl.constexpr(BLOCK_VISIBLE)
_TOUCHED: tl.constexpr = tl.constexpr(BLOCK_TOUCHED)
_LARGEST: tl.constexpr = tl.constexpr(FLOAT32_GRID[3])
_EXACT_GRID: tl.constexpr = tl.constexpr(FLOAT32_GRID)
_EXACT_FORM: tl.constexpr = tl.constexpr(FLOAT32_FORM)


def attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    accumulation: Accumulation,
    weight: str,
    threshold: float,
    by_length: bool,
    scaling: float,
    error_scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    blocks: bool = False,
    exact_query: Tensor | None = None,
    exact_key: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`torchlamp.kernels.attention.fused_attention`, which documents arguments and results, by a Triton kernel."""
    batch, heads, length, depth = query.shape
    key_heads, keys, value_size = key.shape[1], key.shape[2], value.shape[-1]
    output = query.new_zeros(batch, length, heads, value_size)
    selected = torch.zeros(batch, heads, length, dtype=torch.int32, device=query.device)
    visible = _visible(batch, length, keys, mask, causal, query.device)
    noted = None
    if blocks:
        counted = (batch, heads, length, -(-keys // BLOCK_KEYS))
        noted = torch.zeros(counted, dtype=torch.uint8, device=query.device)
    if output.numel() == 0 or keys == 0:
        return output, selected, visible, noted
    query, key, value = (t.detach().resolve_neg() for t in (query, key, value))
    exact_query = query if exact_query is None else exact_query.detach().resolve_neg()
    exact_key = key if exact_key is None else exact_key.detach().resolve_neg()
    seen = None if mask is None else mask.expand(batch, -1, -1, -1)[:, 0].contiguous().view(torch.uint8)
    # One threshold a query, rounded to float32 once.
    count = visible[:, :, 0].double().clamp(min=1)
    bound = torch.full_like(count, threshold)
    if by_length:
        bound = (threshold * torch.sqrt(_LENGTH / count)).clamp(max=1.0)
    grid = (triton.cdiv(length, _ROWS), heads, batch)
    with device_of(query):
        _attention[grid](
            query, *query.stride(), exact_query, *exact_query.stride(),
            key, *key.stride(), exact_key, *exact_key.stride(), value, *value.stride(),
            output, selected, noted if noted is not None else selected, bound.float().contiguous(),
            seen if seen is not None else selected,
            shift.contiguous() if shift is not None else query, sinks.contiguous() if sinks is not None else query,
            heads, length, keys, depth, value_size, heads // key_heads,
            float(scaling), float(softcap or 1.0), float(error_scale),
            GRID=grid_numbers(accumulation.grid), FORM=form_numbers(accumulation),
            RESULT=grid_numbers(accumulation.result), WEIGHT=RULE_WEIGHTS.index(weight),
            SELECTS=threshold != math.inf, CAUSAL=causal, MASKED=seen is not None, CAPPED=softcap is not None,
            SINKS=sinks is not None, SHIFTED=shift is not None, NOTES=noted is not None,
            INTERPRETED=interpreted(), BM=_ROWS, BN=_KEYS, BV=max(16, triton.next_power_of_2(value_size)),
            **launch_options(),
        )  # fmt: skip
    if sinks is None:
        _fill_blind_rows(output, visible[:, :, 0] == 0, value, heads)
    return output, selected, visible, noted


def _visible(
    batch: int, length: int, keys: int, mask: Tensor | None, causal: bool, device: torch.device
) -> Tensor:
    """int32 (batch, length, 2): how many keys each query sees, and the last of them or -1."""
    if mask is None:
        count = torch.full((length,), keys, device=device)
        if causal:
            count = torch.arange(1, length + 1, device=device).clamp(max=keys)
        pair = torch.stack([count, count - 1], dim=-1)
        return pair.to(torch.int32).expand(batch, -1, -1).contiguous()
    seen = mask[:, 0].expand(batch, -1, -1)
    last = (
        (seen * torch.arange(1, keys + 1, device=device)).amax(dim=-1) - 1 if keys else seen.sum(dim=-1) - 1
    )
    return torch.stack([seen.sum(dim=-1), last], dim=-1).to(torch.int32)


def _fill_blind_rows(output: Tensor, blind: Tensor, value: Tensor, heads: int) -> None:
    """Queries that see no key: the mean of all values, as a softmax of equal logits gives."""
    if bool(blind.any()):
        mean = value.double().mean(dim=2).float().repeat_interleave(heads // value.shape[1], dim=1)
        output.copy_(torch.where(blind[:, :, None, None], mean[:, None], output))


@triton.jit
def _logits(scores, softcap, CAPPED: tl.constexpr):
    """Logits of scores and their slope; tanh by exponentials of what isn't positive, so that nothing overflows."""
    logits = scores
    slope = tl.full(scores.shape, 1.0, tl.float32)
    if CAPPED:
        x = scores / softcap
        decay = tl.exp(-2.0 * tl.abs(x))
        size = (1.0 - decay) / (1.0 + decay)
        bounded = tl.where(x < 0, -size, size)
        slope = 1.0 - bounded * bounded
        logits = bounded * softcap
    return logits, slope


@triton.jit
def _weight(z, score, slope, error, WEIGHT: tl.constexpr, CAPPED: tl.constexpr):
    """The weight of the rule, factor by factor as `torchlamp.rules.ThresholdForm` states it."""
    w = z
    if WEIGHT == _STRICT or WEIGHT == _RUNNING:
        w = (1.0 - z) * z * 2.0
    if WEIGHT == _RELAXED:
        w = w * tl.abs(score)
    if CAPPED and WEIGHT != _TOPZ:
        w = w * slope
    if WEIGHT == _STRICT:
        w = w * tl.abs(score)
    if WEIGHT == _RUNNING:
        w = w * error
    return w


@triton.jit
def _seen(i, j, mask, batch, length, keys, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Which keys j the rows i see."""
    seen = (i < length)[:, None] & (j < keys)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    if MASKED:
        at = mask + (batch * length + i.to(tl.int64)[:, None]) * keys + j[None, :]
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _online(logits, seen, top, total):
    """The largest logit and the sum of exponentials with a block more; and the factor of what came before."""
    now = tl.maximum(top, tl.max(tl.where(seen, logits, -INFINITY), axis=1))
    # A row that saw nothing yet has the top -inf: its exponentials are kept at 0.
    base = tl.where(now == -INFINITY, 0.0, now)
    terms = tl.where(seen, tl.exp(logits - base[:, None]), 0.0)
    factor = tl.exp(top - base)
    return now, total * factor + tl.sum(terms, axis=1), terms, factor


@triton.jit
def _low_scores(
    first, a, q_k, i, rows, own_shift, key, key_row, key_k, mask, batch, length, keys, depth, scaling,
    GRID: tl.constexpr, FORM: tl.constexpr, RESULT: tl.constexpr, SQUARES: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, SHIFTED: tl.constexpr, INTERPRETED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The low-precision scores of a block of keys, their sums of squares, and which of them the rows see."""
    j = first + tl.arange(0, BN)
    seen = _seen(i, j, mask, batch, length, keys, CAUSAL, MASKED)
    b = key + j.to(tl.int64) * key_row
    low, squares = tile_sums(a, q_k, rows, b, key_k, j < keys, depth, GRID, FORM, SQUARES, INTERPRETED)
    score = round_to(low * scaling, RESULT)
    if SHIFTED:
        score = score + own_shift[:, None]
    return score, squares, seen


@triton.jit
def _attention(
    q, q_batch, q_head, q_row, q_k, xq, xq_batch, xq_head, xq_row, xq_k,
    key, key_batch, key_head, key_row, key_k, xkey, xkey_batch, xkey_head, xkey_row, xkey_k,
    value, value_batch, value_head, value_row, value_column,
    output, selected, noted, bound, mask, shift, sinks,
    heads, length, keys, depth, value_size, repeats, scaling, softcap, error_scale,
    GRID: tl.constexpr, FORM: tl.constexpr, RESULT: tl.constexpr, WEIGHT: tl.constexpr,
    SELECTS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, SHIFTED: tl.constexpr, NOTES: tl.constexpr, INTERPRETED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    shared = head // repeats
    rows = i < length
    a = q + batch * q_batch + head * q_head + i.to(tl.int64) * q_row
    own_keys = key + batch * key_batch + shared * key_head
    exact_a = xq + batch * xq_batch + head * xq_head + i.to(tl.int64) * xq_row
    row_at = (batch * heads + head) * length + i
    own_shift = tl.zeros((BM,), tl.float32)
    if SHIFTED:
        own_shift = tl.load(shift + row_at, mask=rows, other=0.0)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, tl.program_id(0) * BM + BM)
    sink = tl.full((BM,), -INFINITY, tl.float32)
    if SINKS:
        sink = tl.zeros((BM,), tl.float32) + tl.load(sinks + head)

    # 1. The softmax of the low scores: largest logit and sum.
    top, total = sink, tl.where(sink == -INFINITY, 0.0, 1.0)
    for first in range(0, stop if SELECTS else 0, BN):
        score, _squares, seen = _low_scores(
            first, a, q_k, i, rows, own_shift, own_keys, key_row, key_k, mask, batch, length, keys, depth, scaling,
            GRID, FORM, RESULT, False, CAUSAL, MASKED, SHIFTED, INTERPRETED, BN,
        )  # fmt: skip
        logits, _slope = _logits(score, softcap, CAPPED)
        top, total, _terms, _factor = _online(logits, seen, top, total)
    base = tl.where(top == -INFINITY, 0.0, top)
    limit = tl.load(bound + batch * length + i, mask=rows, other=0.0)
    if WEIGHT == _RELAXED:
        # The threshold is a share of the row's largest weight; NaN if any weight is.
        largest = tl.zeros((BM,), tl.float32)
        broken = tl.zeros((BM,), tl.int32)
        for first in range(0, stop if SELECTS else 0, BN):
            score, _squares, seen = _low_scores(
                first, a, q_k, i, rows, own_shift, own_keys, key_row, key_k, mask, batch, length, keys, depth, scaling,
                GRID, FORM, RESULT, False, CAUSAL, MASKED, SHIFTED, INTERPRETED, BN,
            )  # fmt: skip
            logits, slope = _logits(score, softcap, CAPPED)
            z = tl.exp(logits - base[:, None])
            weight = tl.where(seen, _weight(z, score, slope, score, WEIGHT, CAPPED), 0.0)
            broken += tl.sum((weight != weight).to(tl.int32), axis=1)
            largest = tl.maximum(largest, tl.max(tl.where(weight != weight, 0.0, weight), axis=1))
        limit = tl.where(broken > 0, float("nan"), limit * largest)

    # 2. The rule, recomputation, softmax and values.
    end, whole = sink, tl.where(sink == -INFINITY, 0.0, 1.0)
    count = tl.zeros((BM,), tl.int32)
    column = tl.arange(0, BV)
    summed = tl.zeros((BM, BV), tl.float32)
    for first in range(0, stop, BN):
        j = first + tl.arange(0, BN)
        score, squares, seen = _low_scores(
            first, a, q_k, i, rows, own_shift, own_keys, key_row, key_k, mask, batch, length, keys, depth, scaling,
            GRID, FORM, RESULT, WEIGHT == _RUNNING and SELECTS, CAUSAL, MASKED, SHIFTED, INTERPRETED, BN,
        )  # fmt: skip
        if SELECTS:
            logits, slope = _logits(score, softcap, CAPPED)
            z = tl.exp(logits - base[:, None])
            if WEIGHT != _RELAXED:
                z = z / total[:, None]
            error = tl.sqrt_rn(squares) * error_scale
            weight = _weight(z, score, slope, error, WEIGHT, CAPPED)
            stays = (weight <= limit[:, None]) & (tl.abs(score) <= _LARGEST)
            chosen = (seen.to(tl.int32) & (1 - stays.to(tl.int32))) != 0
            count += tl.sum(chosen.to(tl.int32), axis=1)
            if tl.max(tl.max(chosen.to(tl.int32), axis=1), axis=0) > 0:
                exact_b = xkey + batch * xkey_batch + shared * xkey_head + j.to(tl.int64) * xkey_row
                full, _squares = tile_sums(
                    exact_a, xq_k, rows, exact_b, xkey_k, j < keys, depth, _EXACT_GRID, _EXACT_FORM, False,
                    INTERPRETED,
                )  # fmt: skip
                full = full * scaling
                if SHIFTED:
                    full = full + own_shift[:, None]
                score = tl.where(chosen, full, score)
        logits, _slope = _logits(score, softcap, CAPPED)
        end, whole, terms, factor = _online(logits, seen, end, whole)
        v = value + batch * value_batch + shared * value_head + j.to(tl.int64)[:, None] * value_row
        inside = (j < keys)[:, None] & (column < value_size)[None, :]
        v = tl.load(v + column[None, :] * value_column, mask=inside, other=0.0)
        summed = summed * factor[:, None] + tl.dot(terms, v, input_precision="ieee")
        if NOTES:
            marks = tl.where(seen, _VISIBLE, 0)
            if SELECTS:
                marks = marks | tl.where(chosen, _TOUCHED, 0)
            marks = tl.reshape(marks, (BM, BN // _BLOCK, _BLOCK))
            marks = tl.max(marks & _VISIBLE, axis=2) | tl.max(marks & _TOUCHED, axis=2)
            block = first // _BLOCK + tl.arange(0, BN // _BLOCK)
            blocks = (keys + _BLOCK - 1) // _BLOCK
            here = rows[:, None] & (block < blocks)[None, :]
            tl.store(noted + row_at[:, None] * blocks + block[None, :], marks.to(tl.uint8), mask=here)
    tl.store(selected + row_at, count, mask=rows)
    summed = (
        summed / whole[:, None]
    )  # NaN where every score is -inf, as torch's; rows that see nothing follow
    out_at = ((batch * length + i) * heads + head)[:, None] * value_size + column[None, :]
    tl.store(output + out_at, summed, mask=rows[:, None] & (column < value_size)[None, :])
