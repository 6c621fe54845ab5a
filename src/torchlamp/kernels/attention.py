"""Attention under a threshold rule in one native call.

The native kernel does for the threshold rules what the torch tile loop of `torchlamp.simulation.attention` does for
every rule; that loop is its reference. Scores, and therefore what a rule is shown, agree bit for bit; exponentials
agree to about one unit in the last place (and are 0 below e^-87, where torch still has subnormal numbers), so an entry
whose weight lies that close to the threshold may be decided otherwise.
"""

import torch
from torch import Tensor

from torchlamp.kernels.constants import BLOCK_KEYS, RULE_WEIGHTS
from torchlamp.kernels.dispatch import as_native, native_for
from torchlamp.kernels.specification import Accumulation, accumulation_numbers


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    accumulation: Accumulation,
    *,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Attend with low-precision scores, recomputing in float32 those whose weight exceeds the threshold.

    Parameters
    ----------
    query, key, value
        float32 (B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv).
    accumulation
        How the scores are summed.
    weight, threshold, by_length
        The rule, as `torchlamp.rules.ThresholdForm` describes it.
    scaling
        Factor of the scores.
    error_scale
        For the weight `running`: r = error_scale * sqrt(sum of squares).
    mask
        bool (B or 1, 1, Lq, Lk), True = visible, or None.
    causal
        Query i sees keys 0..i. Not together with `mask`.
    softcap
        c > 0: logits are c tanh(score / c).
    sinks
        float32 (H,): a logit per head that enters the normaliser but has no value.
    blocks
        Also note which blocks of 16 keys a row sees and touches.

    Returns
    -------
    Output float32 (B, Lq, H, Dv); recomputed entries int32 (B, H, Lq); int32 (B, Lq, 2): how many keys each query
    sees, and the index of the last one (-1: none); if asked for, uint8 (B, H, Lq, ceil(Lk / 16)): 1 for a block with a
    visible key, plus 2 if one of them is recomputed. Or None where the native kernel doesn't serve: no extension,
    tensors that aren't float32 on the CPU, a mask for each head, or the weight `relaxed` with sinks.
    """
    served = (mask is None or (mask.shape[1] == 1 and not causal)) and not (
        weight == "relaxed" and sinks is not None
    )
    native = native_for(query, key, value, mask, sinks) if served else None
    if native is None:
        return None
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1])
    selected = torch.empty(batch, heads, length, dtype=torch.int32)
    visible = torch.empty(batch, length, 2, dtype=torch.int32)
    noted = None
    if blocks:
        noted = torch.zeros(batch, heads, length, -(-key.shape[2] // BLOCK_KEYS), dtype=torch.uint8)
    native.extension.attention(
        native.instruction_set,
        *map(as_native, (query, key, value)),
        output,
        selected,
        visible,
        noted,
        None if mask is None else as_native(mask[:, 0].expand(batch, -1, -1)),
        None if sinks is None else as_native(sinks, "all"),
        causal,
        scaling,
        softcap or 0.0,
        RULE_WEIGHTS.index(weight),
        threshold,
        by_length,
        error_scale,
        accumulation_numbers(accumulation),
        torch.get_num_threads(),
    )
    return output, selected, visible, noted
