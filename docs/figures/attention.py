"""The two figures of docs/performance.md: what one token's attention costs, from `torchlamp bench attention --json`.

    python docs/figures/attention.py attention.json

writes attention-length.svg and attention-rate.svg beside this script.
"""

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
plt.rcParams.update(
    {"svg.hashsalt": "torchlamp", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
)


def crossing(xs: list[float], one: list[float], other: list[float]) -> float | None:
    """Where the first line falls below the second for good, between two points on a straight line."""
    for i in range(len(xs) - 1, 0, -1):
        before, after = one[i - 1] - other[i - 1], one[i] - other[i]
        if (before > 0) != (after > 0):
            return xs[i - 1] + (xs[i] - xs[i - 1]) * before / (before - after)
    return None


def part(record: dict, words: str) -> dict[str, float]:
    """Label -> median in milliseconds of the part whose title holds these words."""
    found = next(p for p in record["parts"] if words in p["title"])
    return {t["label"]: 1e3 * t["median"] for t in found["timings"]}


def lengths(record: dict) -> None:
    """Cost over the number of keys."""
    table: dict[str, dict[int, float]] = {}
    for label, median in part(record, "over the number of keys").items():
        keys, _, name = label.partition(" keys, ")
        table.setdefault(name, {})[int(keys)] = median
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, points in table.items():
        style = "-o" if name.startswith("int8") else "--s"
        axes.plot(list(points), list(points.values()), style, markersize=3, label=name)
    ours = table["int8, look-ahead"]
    best = {n: min(points[n] for name, points in table.items() if name.startswith("torch")) for n in ours}
    even = crossing(list(ours), list(ours.values()), list(best.values()))
    if even is not None:
        axes.axvline(even, color="0.6", linewidth=0.8)
        axes.annotate(
            f"break-even: {even:.0f} keys", (even, max(best.values())), fontsize=8, ha="left", va="top"
        )
    axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="ms for one token", xticks=list(ours))
    axes.set_xticklabels([f"{n:,}" for n in ours])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "attention-length.svg", metadata={"Date": None})


def rates(record: dict) -> None:
    """Cost over the share of scores that are recomputed."""
    medians = part(record, "over the recompute rate")
    best = min(m for label, m in medians.items() if label.startswith("torch"))
    points = {
        float(match[1]): m
        for label, m in medians.items()
        if (match := re.match(r"([\d.]+)% of the scores", label))
    }
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(
        list(points), list(points.values()), "-o", markersize=3, label="int8, look-ahead, values low-bit"
    )
    axes.axhline(best, linestyle="--", color="tab:orange", label="the best of torch")
    even = crossing(list(points), list(points.values()), [best] * len(points))
    if even is not None:
        axes.axvline(even, color="0.6", linewidth=0.8)
        axes.annotate(f" break-even: {even:.1f} %", (even, min(points.values())), fontsize=8)
    axes.set(xlabel="% of the scores recomputed", ylabel="ms for one token", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "attention-rate.svg", metadata={"Date": None})


if __name__ == "__main__":
    contents = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lengths(contents)
    rates(contents)
