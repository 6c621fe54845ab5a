"""What two steps of `running-residual` are worth: its KL and that of variants, at equal recompute rates.

    python docs/study/ablation.py smollm2-135m
    python docs/study/ablation.py gemma3-270m

Variants: `first-order` takes the derivative z_j r_j in the place of the
exact response to an error, `plain-stream` measures the residual stream without the weight of the norm that reads it.
The windows are not those of the study.
"""

import argparse
from dataclasses import dataclass, replace

import torch

import torchlamp
from torchlamp.data.text import cut_windows, default_text
from torchlamp.huggingface import install
from torchlamp.huggingface.residual_stream import residual_ahead
from torchlamp.report.tables import at_rates
from torchlamp.rules import RunningOutput, RunningResidual, register

RATES = (0.005, 0.01, 0.02, 0.04)
THRESHOLDS = {"smollm2-135m": (0.0095, 0.003, 0.0006), "gemma3-270m": (0.05, 0.0145, 0.0045)}


@register
@dataclass(frozen=True)
class FirstOrder(RunningResidual):
    """`first-order:T`: running-residual with z_j r_j in the place of the exact response."""

    name = "first-order"
    examples = ("first-order:0.001",)
    weight = RunningOutput.weight  # z s distance r, with the distances that the residual rules ask for


@register
@dataclass(frozen=True)
class PlainStream(RunningResidual):
    """`plain-stream:T`: running-residual with G = 1."""

    name = "plain-stream"
    examples = ("plain-stream:0.001",)


class WithoutWeight:
    """The sites of a model whose next norm seems to have the weight 1."""

    def __init__(self, sites, layer):
        self._sites, self._reads = sites, sites.norms(layer).mlp[1]

    def __getattr__(self, name):
        return getattr(self._sites, name)

    def norm(self, module, size):
        """The formula of a norm."""
        norm = self._sites.norm(module, size)
        return replace(norm, weight=torch.ones_like(norm.weight)) if module is self._reads else norm


def without_weight(sites, layer, stream):
    """What `residual_ahead` gives if the next norm's weight is 1."""
    return residual_ahead(WithoutWeight(sites, layer), layer, stream)


def main() -> None:
    """Run the variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=THRESHOLDS)
    parser.add_argument("--accumulate", default="ps4")
    chosen = parser.parse_args()
    model, tokenizer = torchlamp.load(chosen.model)
    windows = cut_windows(tokenizer, [default_text()], 26, 384)[[22, 25]]
    base = None
    print("KL, and its ratio to that of running-residual, at recompute rates of")
    print(" " * 17 + "".join(f"{100 * rate:>15.1f} %" for rate in RATES))
    for rule in ("running-residual", "first-order", "plain-stream"):
        install.residual_ahead = without_weight if rule == "plain-stream" else residual_ahead
        points = [
            torchlamp.evaluate(model, windows, f"{chosen.accumulate}+{rule}:{threshold:g}", baselines=False)
            for threshold in THRESHOLDS[chosen.model]
        ]
        kl = at_rates([p.recompute_rate for p in points], [p.kl_mean for p in points], RATES)
        base = kl if base is None else base
        cells = (f"{x:>11.2e} {x / b:5.2f}" for x, b in zip(kl, base, strict=True))
        print(f"{rule:17}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
