"""What look-ahead costs beside the uniform format of the same error, under the same transforms.

    python docs/study/frontier.py docs/study/transforms/results.jsonl

For every point with a rule: its KL, the mantissa bits of the uniform format that would have the same KL (interpolated
between uniform points in log KL; beyond them a factor of 4 for each bit), and the operations of both relative to
float32 scores. `linear` takes a narrow multiply-add as bits / 32 of a float32 one. `energy` scales the figures of
45 nm silicon (M. Horowitz, Computing's energy problem, ISSCC 2014: float32 multiplication 3.7 pJ, addition 0.9 pJ;
float16 1.1 and 0.4 pJ): a multiplier as the square of its significand, which gives 0.8 pJ for float16, an adder as its
bits, which gives 0.45.
"""

import argparse
import itertools
import math
from pathlib import Path

from torchlamp.evaluation.cost import GRANULARITIES, CostModel, Shape, costs
from torchlamp.policy.policy import Policy
from torchlamp.results.journal import read_lines

MULTIPLY, ADD, SIGNIFICAND, BITS = 3.7, 0.9, 24, 32


def linear(mantissa):
    """A multiply-add into PS(mantissa), relative to float32."""
    return (9 + mantissa) / BITS


def energy(mantissa):
    """The same by energy."""
    both = MULTIPLY * ((mantissa + 1) / SIGNIFICAND) ** 2 + ADD * (9 + mantissa) / BITS
    return both / (MULTIPLY + ADD)


def bits_of(kl, uniform):
    """Mantissa bits of the uniform format with this KL."""
    known = sorted(uniform.items())
    for (low, worse), (high, better) in itertools.pairwise(known):
        if better <= kl <= worse:
            return low + (high - low) * math.log(worse / kl) / math.log(worse / better)
    nearest, its = known[0] if kl > known[0][1] else known[-1]
    return nearest + math.log(its / kl, 4)


def main():
    """Print a line for each point with a rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    records = read_lines(parser.parse_args().results, "torchlamp-sweep/1").records
    results = [record["result"] for record in records if record["status"] == "done"]
    uniform, rules = {}, []
    for result in results:
        part = Policy.parse(result["policy"]).sites["scores"]
        chain, mantissa = (
            ".".join(map(str, part.precision.transforms)),
            part.accumulate.format.grid.mantissa_bits,
        )
        if part.rule.name == "none":
            uniform.setdefault((result["model"], chain), {})[mantissa] = result["kl_mean"]
        else:
            rules.append((result, part, chain, mantissa))
    print(
        "model, policy, rate, KL, bits of the uniform format; cost of look-ahead / of that format (transforms apart)"
    )
    for result, part, chain, mantissa in rules:
        known = uniform.get((result["model"], chain))
        if known is None:
            continue
        bits, length = bits_of(result["kl_mean"], known), result["window_length"]
        shape = Shape(length, length, result["sizes"]["head"], causal=True)
        line = [
            f"{result['model']} {result['policy']} {result['recompute_rate']:.2%} {result['kl_mean']:.1e} {bits:.1f};"
        ]
        for unit in list(GRANULARITIES)[:2]:
            for model in (linear, energy):
                narrow = model(mantissa)
                # The sum of squares and the distances in the narrow unit, too.
                given = CostModel(low=narrow, error=None, distance=None)
                cost = costs(
                    shape, part.accumulate, part.rule, result["recompute_rate"], result["block_rates"], given,
                    transforms=part.precision.transforms,
                )[unit]  # fmt: skip
                line.append(f"{unit} {model.__name__} {cost.total - cost.transforms:.2f}/{model(bits):.2f}")
        print(*line, f"transforms {cost.transforms:.2f}")


if __name__ == "__main__":
    main()
