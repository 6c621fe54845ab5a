"""Which rule buys the most accuracy for its recomputations? KL against recompute rate, on a real LLM.

`python examples/compare_rules.py [--model NAME] [--windows N] [--window-length N]` takes about a minute on 2 cores.
More windows, smaller error bars.
"""

import argparse

import torchlamp
from torchlamp.data.text import cut_windows, default_text

RULES = ("none", "topz:0.1", "strict:0.3", "strict:0.1", "relaxed:0.1", "running:0.03", "running:0.01", "all")


def main() -> None:
    """Evaluate every rule on the same windows and print a line for each."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="as for torchlamp.load [%(default)s]")
    parser.add_argument(
        "--windows", type=int, default=2, help="windows of Python's documentation [%(default)s]"
    )
    parser.add_argument("--window-length", type=int, default=256, help="tokens of a window [%(default)s]")
    asked = parser.parse_args()
    model, tokenizer = torchlamp.load(asked.model)
    windows = cut_windows(tokenizer, [default_text()], asked.windows, asked.window_length)
    print(f"{'rule':14} {'recomputed':>10} {'KL (nats per token)':>22} {'flips':>7}")
    for rule in RULES:
        result = torchlamp.evaluate(model, windows, torchlamp.Policy("ps4", rule), baselines=False)
        kl = f"{result.kl_mean:.2e} ± {result.kl_standard_error:.0e}"
        print(f"{rule:14} {result.recompute_rate:10.2%} {kl:>22} {result.flip_rate:7.2%}")


if __name__ == "__main__":
    main()
