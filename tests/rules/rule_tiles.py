"""Tiles to test rules on."""

import torch
from torch import Tensor

from torchlamp.rules import Tile


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def causal(rows: int, keys: int) -> Tensor:
    """The last row sees all keys, each row before it one fewer."""
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


def random_tile(
    *shape: int,
    seed: int = 0,
    spread: float = 2.0,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tile:
    """Normal scores with everything that some rule needs; causal unless `visible` is given."""
    source = generator(seed)
    scores = torch.randn(shape, generator=source, dtype=torch.float64) * spread
    error = torch.rand(shape, generator=source, dtype=torch.float64) * 0.1
    distance = torch.rand(shape, generator=source, dtype=torch.float64) * 2
    exact = scores + error * torch.randn(shape, generator=source, dtype=torch.float64)
    shown = causal(*shape[-2:]) if visible is None else visible
    tile = Tile.from_scores(
        scores.to(dtype),
        shown,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(dtype),
        error=error.to(dtype),
        generator=generator(seed + 1),
    )
    return tile.replace(
        exact=exact.to(dtype),
        distance=distance.to(dtype),
        output_distance=distance.to(dtype),
        bridge_error=error.to(dtype),
    )


def row(
    scores: list[float],
    *,
    error: list[float] | None = None,
    sink: float | None = None,
    softcap: float | None = None,
) -> Tile:
    """One float64 row, everything visible."""
    as_row = torch.tensor([scores], dtype=torch.float64)
    return Tile.from_scores(
        as_row,
        softcap=softcap,
        sinks=None if sink is None else torch.tensor([[sink]], dtype=torch.float64),
        error=None if error is None else torch.tensor([error], dtype=torch.float64),
    )


def from_probabilities(probabilities: list[float]) -> Tile:
    """One float64 row with exactly these probabilities; scores are their logarithms."""
    z = torch.tensor([probabilities], dtype=torch.float64)
    return Tile(z.log(), z.log(), z, torch.ones_like(z, dtype=torch.bool))
