"""The page of `torchlamp inspect`: the recorded tiles, packed small enough to travel inside one HTML file."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

import torchlamp
from torchlamp.evaluation.inspect import Inspection, Layer
from torchlamp.report.page import pack, render

#: Scores are part of the page up to so many entries (6 bytes each in base64); beyond, only probabilities are.
MAX_SCORES = 1_200_000


def inspect_page(inspection: Inspection, model: str) -> str:
    """The page as HTML: for every layer and head the attention map and the recomputed entries.

    Of each row only the keys up to its own position are stored, row after row: the probability as round(255 sqrt p),
    255 levels that are finest near 0, plus one bit for the choice; the float32 score and the low-precision score's
    error as float16.

    Raises
    ------
    ValueError
        The inspection holds no layer.
    """
    if not inspection.layers:
        raise ValueError(f"policy {inspection.policy!r} ran at no layer's scores: nothing to inspect")
    length = len(inspection.tokens)
    lower = torch.ones(length, length, dtype=torch.bool).tril()
    entries = sum(layer.chosen.shape[0] for layer in inspection.layers.values()) * int(lower.sum())
    with_scores = entries <= MAX_SCORES
    data = {
        "model": model,
        "policy": inspection.policy,
        "tokens": inspection.tokens,
        "kl": [float(f"{v:.4g}") if np.isfinite(v) else None for v in inspection.kl.tolist()],
        "layers": [_layer(number, layer, lower, with_scores) for number, layer in inspection.layers.items()],
    }
    return render(
        "inspect",
        data,
        model=model,
        policy=inspection.policy,
        length=length,
        rate=f"{100 * inspection.recompute_rate:.2f}\N{NO-BREAK SPACE}%",
        shares=diagonal_shares(inspection),
        version=torchlamp.__version__,
    )


def diagonal_shares(inspection: Inspection) -> dict[str, str]:
    """Percent of all recomputed entries on the first token, the diagonal and beside it; empty without any."""
    chosen = torch.stack([layer.chosen.sum(dim=0) for layer in inspection.layers.values()]).sum(dim=0)
    total = int(chosen.sum())
    if not total:
        return {}
    shares = {
        "on the first token": int(chosen[:, 0].sum()),
        "on the query's own token": int(chosen.diagonal()[1:].sum()),
        "on the token before it": int(chosen.diagonal(-1)[1:].sum()),
    }
    return {name: f"{100 * count / total:.0f}\N{NO-BREAK SPACE}%" for name, count in shares.items()}


def _layer(number: int, layer: Layer, lower: Tensor, with_scores: bool) -> dict[str, Any]:
    probabilities = layer.probabilities[:, lower].clamp(0, 1).nan_to_num(0.0)
    packed: dict[str, Any] = {
        "number": number,
        "heads": layer.chosen.shape[0],
        "chosen": pack(np.packbits(layer.chosen[:, lower].numpy().reshape(-1), bitorder="little")),
        "visible": pack(np.packbits(layer.visible[:, lower].numpy().reshape(-1), bitorder="little")),
        "probabilities": pack((255 * probabilities.sqrt()).round().to(torch.uint8).numpy()),
    }
    if with_scores:
        with np.errstate(over="ignore"):
            packed["exact"] = pack(layer.exact[:, lower].numpy().astype("<f2"))
            packed["error"] = pack((layer.scores - layer.exact)[:, lower].numpy().astype("<f2"))
    return packed
