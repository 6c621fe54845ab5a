"""A tile of query rows under an accumulator with an online softmax: narrow scores, look-ahead, narrow exponentials.

References
----------
LampAttention, arXiv 2609.39361; docs/lamp-attention.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.fma import fma
from torchlamp.kernels.online import OnlineFormats, online_weights
from torchlamp.kernels.products import products
from torchlamp.kernels.rounding import round_to_grid
from torchlamp.kernels.specification import Accumulation, Grid
from torchlamp.rules.online_tile import OnlineTile
from torchlamp.rules.rule import Rule
from torchlamp.rules.tile import Tile
from torchlamp.simulation.softmax import capped_logits, visible_softmax
from torchlamp.simulation.stored_attention import Softmax, Weighed
from torchlamp.simulation.tile_counts import count_tiles
from torchlamp.simulation.visibility import Visibility

#: An answer of a tile from the tile's probabilities or scores, computed when a rule asks.
Answers = dict[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class OnlineScores:
    """The scores of a tile in an online softmax, float32 (heads, rows, keys) each.

    `squares` are the running sums of squares of the narrow accumulation, if asked for.
    """

    low: Tensor
    high: Tensor
    squares: Tensor | None


def origin(seen: Visibility, sample: int) -> tuple[int, int]:
    """The first query row that sees a key, and the first key that is seen: warps and tiles are counted from there.

    So padding in front of a sequence changes nothing. (0, 0) where no row sees a key.
    """
    if seen.mask is None:
        return 0, 0
    shown = seen.mask[sample if seen.mask.shape[0] > 1 else 0].any(0)
    if seen.causal:
        shown = shown.tril()
    rows, keys = shown.any(1).nonzero(), shown.any(0).nonzero()
    return (int(rows[0]), int(keys[0])) if len(rows) else (0, 0)


def norm_products(query: Tensor, key: Tensor) -> Tensor:
    """|q_i| |k_j|, float32 (heads, rows, keys), from (heads, rows, size) and (key heads, keys, size)."""
    norms = key.norm(dim=-1).repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    bounds: Tensor = query.norm(dim=-1)[..., None] * norms[:, None]
    return bounds


def online_scores(
    low: tuple[Tensor, Tensor],
    high: tuple[Tensor, Tensor],
    narrow: Accumulation,
    wide: Accumulation,
    *,
    causal: int | None,
    squares: bool,
    generator: torch.Generator | None,
) -> OnlineScores:
    """Narrow sums, and the sums that recomputation gives.

    Parameters
    ----------
    low, high : pair of Tensor
        float32 (heads, rows, size) and (key heads, size, keys): the operands of the narrow pass and of recomputation.
    narrow, wide : Accumulation
        How each is summed.
    causal : int or None
        As for `products`.
    squares : bool
        Whether to keep the running sums of squares.
    generator : torch.Generator or None
        Rounds the narrow sums at random.
    """
    if generator is None:
        sums, running = products(*low, narrow, causal=causal, squares=squares)
    else:
        sums, running = _stochastic(*low, narrow.grid, generator)
    again, _ = products(*high, wide, causal=causal)
    return OnlineScores(sums, again, running)


def _stochastic(a: Tensor, b: Tensor, grid: Grid, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Strict sums that are rounded up or down at random at every step, and their running sums of squares."""
    left = a.double().reshape(b.shape[0], -1, *a.shape[1:])
    total = torch.zeros(*left.shape[:3], b.shape[2], device=a.device)
    squares = torch.zeros_like(total)
    for k in range(a.shape[2]):
        total = fma(left[..., k, None], b[:, None, None, k].double(), total)
        total = round_to_grid(total, grid, "stochastic", generator)
        squares = fma(total, total, squares)
    return total.flatten(0, 1), squares.flatten(0, 1)


def weigh_online(
    scores: OnlineScores,
    visible: Tensor,
    softmax: Softmax,
    shift: Tensor | None,
    *,
    rule: Rule,
    formats: OnlineFormats,
    offset: int,
    layer: int,
    generator: torch.Generator | None,
    answers: Answers,
    observe: Callable[[Tile, Tensor], None],
) -> Weighed:
    """Weights of the values of a tile of query rows, after look-ahead and recomputation.

    Softcap, bias and the shift of centred keys act in float32; their results are rounded to the scores' format again.

    Parameters
    ----------
    scores : OnlineScores
        Of the tile.
    visible : Tensor
        bool (heads or 1, rows, keys).
    softmax : Softmax
        Softcap, bias and sinks.
    shift : Tensor or None
        float32 (heads, rows, 1), added to all scores of a row.
    rule, layer, generator
        What chooses, and what it may read.
    formats : OnlineFormats
        Of scores, shifts and exponentials.
    offset : int
        Place of the first key in its tile of 64.
    answers : dict
        Of `OnlineTile`, as functions of the scores or, for the distances of values, of the weights.
    observe : callable
        Called with the tile and what was chosen.
    """
    low, slope = _logits(scores.low, softmax, shift, formats.low)
    high, _ = _logits(scores.high, softmax, shift, formats.high)
    shown = visible.expand(low.shape)
    sink = None if softmax.sinks is None else softmax.sinks.view(-1, 1, 1)
    probabilities = visible_softmax(low, ~shown, softmax.sinks)

    def told(name: str) -> Callable[[], Tensor]:
        given = probabilities if name in ("distance", "output_distance") else scores.low
        return lambda: answers[name](given)[None]

    tile = OnlineTile(
        scores.low[None],
        low[None],
        probabilities[None],
        shown[None],
        None if slope is None else slope[None],
        recomputed=high[None],
        formats=formats,
        offset=offset,
        sink=sink,
        generator=generator,
        layer=layer,
        **{name: told(name) for name in answers},
    )
    chosen, late = rule.stages(tile)
    observe(tile, chosen)
    late = torch.zeros_like(chosen) if late is None else late
    weights = online_weights(low, high, shown, chosen[0], late[0], formats, offset=offset, sink=sink)
    counts = count_tiles(shown, chosen[0], scores.low, formats.low, offset)
    return Weighed(weights, visible, chosen[0], tiles=counts)


def _logits(
    scores: Tensor, softmax: Softmax, shift: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """What enters the softmax, in the scores' format, and the slope of a softcap."""
    if shift is None and softmax.softcap is None and softmax.bias is None:
        return scores, None
    shifted = scores if shift is None else scores + shift
    logits, slope = capped_logits(shifted, softmax.softcap, softmax.bias)
    return round_to_grid(logits, grid), slope
