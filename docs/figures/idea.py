"""Draws docs/figures/idea.svg: one attention head of SmolLM2-135M on one sentence, before and after look-ahead.

Run it with `python docs/figures/idea.py` (needs matplotlib). Every number in the picture is computed here.
"""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import torchlamp
from torchlamp.kernels.products import products
from torchlamp.rules import Tile

SENTENCE = "Most rounding errors in a transformer don't matter. A few matter a lot."
LAYER, HEAD, FORMAT, RULE = 5, 6, "ps4", "strict:0.5"

captured = {}


def capture(module, query, key, value, mask, **kwargs):
    """Keep the queries and keys of each layer, and attend as usual."""
    captured[module.layer_idx] = query, key
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def main() -> None:
    """Compute the three panels and draw them."""
    AttentionInterface.register("capture", capture)
    model, tokenizer = torchlamp.load("smollm2-135m")
    tokens = tokenizer(SENTENCE, return_tensors="pt").input_ids
    model.set_attn_implementation("capture")
    with torch.inference_mode():
        model(tokens)
    query, key = captured[LAYER]
    query, key = query[0, HEAD : HEAD + 1], key[0, HEAD // 3 : HEAD // 3 + 1].transpose(1, 2)
    scaling = query.shape[-1] ** -0.5

    def scores(spelling: str) -> torch.Tensor:
        accumulation = torchlamp.Accumulator.parse(spelling).accumulation
        return products(query, key, accumulation, scaling=scaling)[0]

    low, exact = scores(FORMAT), scores("fp32")
    visible = torch.ones_like(low, dtype=torch.bool).tril()
    tile = Tile.from_scores(low, visible)
    chosen = torchlamp.Rule.parse(RULE).select(tile)
    mixed = Tile.from_scores(torch.where(chosen, exact, low), visible).probabilities
    true = Tile.from_scores(exact, visible).probabilities
    z = tile.probabilities
    weight = 2 * z * (1 - z) * low.abs()

    def l1(p: torch.Tensor) -> float:
        return float((p - true).abs().sum(-1).mean())

    count, eligible = int(chosen.sum()), int(visible.sum())
    labels = [tokenizer.decode(t).replace("\n", "\\n") for t in tokens[0]]
    mpl.rcParams.update({"svg.fonttype": "path", "font.size": 8, "svg.hashsalt": "torchlamp"})
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.9), sharey=True)
    panels = [
        (
            "1. Compute all scores cheaply\n(4 mantissa bits): error of each score",
            (low - exact).abs(),
            "Greys",
        ),
        ("2. Look ahead through the softmax:\nwhich errors will it amplify?", weight, "Blues"),
        (f"3. Recompute only those: {count} of {eligible}\n(red), the rest stays cheap", z, "Greys"),
    ]
    for axis, (title, values, colours) in zip(axes, panels, strict=True):
        axis.imshow(values[0].masked_fill(~visible[0], float("nan")), cmap=colours, vmin=0)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(labels)), labels, rotation=90)
        axis.set_yticks(range(len(labels)), labels)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    for row, column in chosen[0].nonzero().tolist():
        box = plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="crimson", linewidth=1.5)
        axes[2].add_patch(box)
    figure.subplots_adjust(left=0.08, right=0.99, top=0.9, bottom=0.21, wspace=0.08)
    figure.supxlabel(
        f"SmolLM2-135M, layer {LAYER}, head {HEAD}. Mean l1 error of the attention rows: "
        f"{l1(z):.4f} all cheap, {l1(mixed):.4f} with {count / eligible:.0%} of the scores recomputed.",
        fontsize=8.5,
    )
    figure.savefig(Path(__file__).with_name("idea.svg"), metadata={"Date": None}, facecolor="white")
    print(f"{count} of {eligible} recomputed; mean l1 error {l1(z):.5f} -> {l1(mixed):.5f}")


if __name__ == "__main__":
    main()
