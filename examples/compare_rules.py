"""Which rule buys the most accuracy for its recomputations? KL against recompute rate, on a real LLM.

Run it with `python examples/compare_rules.py`; on 2 cores it takes about a minute. More windows, smaller error bars.
"""

import torchlamp
from torchlamp.data.text import cut_windows, default_text

WINDOWS, LENGTH = 2, 256
RULES = ("none", "topz:0.1", "strict:0.3", "strict:0.1", "relaxed:0.1", "running:0.03", "running:0.01", "all")


def main() -> None:
    """Evaluate every rule on the same windows and print a line for each."""
    model, tokenizer = torchlamp.load("smollm2-135m")
    windows = cut_windows(tokenizer, [default_text()], WINDOWS, LENGTH)
    print(f"{'rule':14} {'recomputed':>10} {'KL (nats per token)':>22} {'flips':>7}")
    for rule in RULES:
        result = torchlamp.evaluate(model, windows, torchlamp.Policy("ps4", rule), baselines=False)
        kl = f"{result.kl_mean:.2e} ± {result.kl_standard_error:.0e}"
        print(f"{rule:14} {result.recompute_rate:10.2%} {kl:>22} {result.flip_rate:7.2%}")


if __name__ == "__main__":
    main()
