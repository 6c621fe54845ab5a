"""Attention under a threshold rule by its definition: whole matrices of scores, one operation a line.

The oracle of `torchlamp.kernels.attention.fused_attention`, in float64 where the kernel may round otherwise. Scores are
bit for bit those of the kernel, since sums come from `products`, whose reference is tested on its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.products import products
from torchlamp.kernels.specification import Accumulation, Grid


@dataclass
class Attended:
    """What the oracle finds; `weight` and `threshold` tell how near a decision was."""

    output: Tensor
    chosen: Tensor
    weight: Tensor
    threshold: Tensor
    #: What float32 may err of the weight by: nothing to speak of, but for differences of nearly equal lengths.
    slack: Tensor


def attend(
    query,
    key,
    value,
    accumulation,
    *,
    weight,
    threshold,
    by_length,
    scaling,
    error_scale,
    mask,
    causal,
    softcap,
    sinks,
    exact_query=None,
    exact_key=None,
    shift=None,
    row_error=None,
    key_error=None,
    bridge=None,
    residual=None,
    draws=None,
):
    """The arguments of `fused_attention`; output (B, Lq, H, Dv) in float64."""
    heads, keys = query.shape[1], key.shape[2]
    repeats = heads // key.shape[1]
    moved = torch.zeros(()) if shift is None else shift[..., None]

    def scores(q: Tensor, k: Tensor, how: Accumulation) -> tuple[Tensor, Tensor]:
        left, right = q.flatten(0, 1), k.flatten(0, 1).mT
        y, squares = products(left, right, how, scaling=scaling, squares=True)
        return y.view(*q.shape[:3], keys) + moved, squares.view(*q.shape[:3], keys)

    low, squares = scores(query, key, accumulation)
    exact, _ = scores(
        query if exact_query is None else exact_query,
        key if exact_key is None else exact_key,
        Accumulation(Grid()),
    )
    visible = torch.ones(query.shape[2], keys, dtype=torch.bool) if mask is None else mask
    if causal:
        visible = visible.tril()
    visible = visible.expand(low.shape)

    def softmax(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = y.double()
        logits = y if not softcap else softcap * torch.tanh(y / softcap)
        slope = torch.ones_like(y) if not softcap else 1 - torch.tanh(y / softcap) ** 2
        shown = logits.masked_fill(~visible, -torch.inf)
        if sinks is None:
            z = shown.softmax(-1)
        else:
            sink = sinks.double().view(1, -1, 1, 1).expand(*shown.shape[:3], 1)
            z = torch.cat([shown, sink], -1).softmax(-1)[..., :-1]
        return z, slope, (shown - shown.amax(-1, keepdim=True)).exp()

    z, slope, relative = softmax(low)
    sums_err = error_scale * squares.double().sqrt()
    error = sums_err
    if row_error is not None:
        operands = (
            row_error.double()[..., None] * key_error.double().repeat_interleave(repeats, 1)[:, :, None]
        )
        error = operands if accumulation.grid.is_float32 else torch.hypot(sums_err, operands)
    magnitude = low.double().abs()
    if bridge is not None:
        of_q, of_k, score_part, norm_part = bridge
        norms = of_q.double()[..., None] * of_k.double().repeat_interleave(repeats, 1)[:, :, None]
        error = error_scale * (score_part * magnitude**2 + norm_part * norms).sqrt()
    values = value.double().repeat_interleave(repeats, 1)
    away = slack = 0
    if residual is not None:
        # ||L^T (v_j - o)|| entry by entry: no squares of sums that cancel.
        factor, scale = residual.factor.double(), residual.scale.double()[:, None, :, None]
        apart = values[:, :, None] - (z @ values)[:, :, :, None]
        distance = (apart @ factor[:, None]).norm(dim=-1)
        away = distance / scale
        slack = residual.squares.double().amax(-1)[..., None, None] * 1e-6 / distance.clamp_min(1e-6) / scale
    d = slope * error
    response = z * torch.sinh(d) / (1 + 4 * z * (1 - z) * torch.sinh(d / 2) ** 2)
    w = {
        "strict": 2 * z * (1 - z) * slope * magnitude,
        "running": 2 * z * (1 - z) * slope * error,
        "topz": z,
        "relaxed": relative * magnitude * slope,
        "bridge": 2 * z * (1 - z) * slope * error,
        "running-residual": response * away,
        "bridge-residual": response * away,
    }[weight].masked_fill(~visible, 0)
    limit = torch.full(w.shape[:-1], threshold, dtype=torch.float64)[..., None]
    if weight == "relaxed":
        if by_length:
            limit = (threshold * (1024 / visible.sum(-1, keepdim=True)).sqrt()).clamp(max=1)
        limit = limit * w.amax(-1, keepdim=True)
    chosen = visible & ~(w <= limit) if threshold != float("inf") else torch.zeros_like(visible)
    if draws is not None:
        order = (
            draws.expand(chosen.shape).masked_fill(~visible, 2).argsort(stable=True, dim=-1).argsort(dim=-1)
        )
        chosen = order < chosen.sum(-1, keepdim=True)
    z, _, _ = softmax(torch.where(chosen, exact, low))
    blind = ~visible.any(-1, keepdim=True)
    z = torch.where(blind, 0.0 if sinks is not None else 1 / keys, z)
    output = z @ values
    return Attended(output.transpose(1, 2), chosen, w, limit, response * slack)
