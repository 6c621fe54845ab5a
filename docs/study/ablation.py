"""What each step of `running-residual` is worth: KL at given thresholds, and read off at equal recompute rates.

    python docs/study/ablation.py smollm2-135m
    python docs/study/ablation.py gemma3-270m

Beside the rules of the package it runs two variants: `first-order` takes the derivative z_j r_j in the place of the
exact response to an error, `plain-stream` measures the residual stream without the weight of the norm that reads it.
The windows are not those of the study.
"""

import argparse
from dataclasses import dataclass, replace

import torch

import torchlamp
from torchlamp.integrations import install
from torchlamp.integrations.stream import residual_ahead
from torchlamp.rules import RunningOutput, RunningResidual, register
from torchlamp.study.report_tables import at_rates
from torchlamp.study.text import cut_windows, default_text

RATES = (0.005, 0.01, 0.02, 0.04)
THRESHOLDS = {
    "smollm2-135m": {
        "strict": (1.8, 0.25, 0.03),
        "running": (0.1, 0.02, 0.004),
        "residual": (0.009, 0.0025, 0.0005),
    },
    "gemma3-270m": {
        "strict": (2.0, 0.5, 0.1),
        "running": (0.26, 0.08, 0.018),
        "residual": (0.05, 0.0145, 0.004),
    },
}


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
        norm = self._sites.norm(module, size)
        return replace(norm, weight=torch.ones_like(norm.weight)) if module is self._reads else norm


def without_weight(sites, layer, stream):
    return residual_ahead(WithoutWeight(sites, layer), layer, stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=THRESHOLDS)
    parser.add_argument("--accumulate", default="ps4")
    chosen = parser.parse_args()
    model, tokenizer = torchlamp.load(chosen.model)
    windows = cut_windows(tokenizer, [default_text()], 26, 384)[[19, 22, 25]]
    thresholds = THRESHOLDS[chosen.model]
    base = None
    print(f"{'rule':18}" + "".join(f"{100 * rate:>15.1f} %" for rate in RATES))
    for rule in ("strict", "running", "running-output", "plain-stream", "first-order", "running-residual"):
        kind = {"strict": "strict", "running": "running", "running-output": "running"}.get(rule, "residual")
        install.residual_ahead = residual_ahead
        if rule == "plain-stream":
            install.residual_ahead = without_weight
        points = [
            torchlamp.evaluate(model, windows, f"{chosen.accumulate}+{rule}:{t:g}", baselines=False)
            for t in thresholds[kind]
        ]
        kl = at_rates([p.recompute_rate for p in points], [p.kl_mean for p in points], RATES)
        base = kl if base is None else base
        print(
            f"{rule:18}" + "".join(f"{x:>10.2e} {x / b:5.2f} " for x, b in zip(kl, base, strict=True)),
            flush=True,
        )


if __name__ == "__main__":
    main()
