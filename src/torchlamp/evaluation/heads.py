"""Static per-head precision, learned from a calibration text: which heads to keep in float32 always."""

from typing import Any

import torch
from torch import Tensor

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.policy.precision import Precision
from torchlamp.rules.heads import Heads
from torchlamp.rules.oracle import OracleResidual
from torchlamp.simulation.attention_call import Observation


def choose_heads(model: Any, windows: Tensor, accumulate: str | Accumulator, rate: float) -> Heads:
    """The heads whose rounding errors disturb the residual stream most, as many as fit a recompute rate.

    One pass in low precision measures for every head the sum over rows and keys of the squared weights of
    `oracle-residual`, with the true errors: what the head's errors do to the stream if they are independent. Heads
    are taken in descending order of that sum per score, until the next one would exceed the rate.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A float32, bfloat16 or float16 decoder.
    windows : Tensor
        int64 (n, length): calibration text, which shouldn't be the text that the choice is tested on.
    accumulate : str or Accumulator
        Of the scores.
    rate : float
        Share of the scores that may be recomputed, in (0, 1).

    Returns
    -------
    Heads
        The rule; with at least one head, even if that is more than the rate.

    Raises
    ------
    ValueError
        A rate outside (0, 1), or a model whose layers aren't known.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate {rate}: give a share of the scores between 0 and 1")
    harm: dict[tuple[int, int], float] = {}
    scores: dict[tuple[int, int], int] = {}
    measure = OracleResidual(1e30)

    def observe(layer: int, seen: Observation) -> None:
        weight = measure.weight(seen.tile).masked_fill(~seen.tile.visible, 0.0)
        squares = weight.double().square().sum(dim=(0, 2, 3)).tolist()
        counts = seen.tile.visible.sum(dim=(0, 2, 3)).tolist()
        for head, (square, count) in enumerate(zip(squares, counts, strict=True)):
            harm[layer, head] = harm.get((layer, head), 0.0) + square
            scores[layer, head] = scores.get((layer, head), 0) + count

    policy = Policy(sites={"scores": SitePolicy(Precision.parse(accumulate), measure)})
    with torch.inference_mode(), lookahead(model, policy, observe=observe):
        for window in windows:
            model(input_ids=window[None].to(model.device), use_cache=False)
    order = sorted(harm, key=lambda at: harm[at] / max(scores[at], 1), reverse=True)
    allowed = rate * sum(scores.values())
    chosen: list[tuple[int, int]] = []
    for at in order:
        allowed -= scores[at]
        if allowed < 0 and chosen:
            break
        chosen.append(at)
    return Heads(frozenset(chosen))
