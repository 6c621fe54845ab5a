"""Time a model's simulated forward pass under several policies: what does a rule, a transform or a site cost?

    OMP_NUM_THREADS=1 python benchmarks/policies.py smollm2-135m ps4+strict:0.1 ps4+running-residual:0.003

The policies take turns, so that all see the same machine. A line gives the medians of the seconds and of the process'
own CPU seconds, which neighbours disturb less, both also relative to the first policy's, and the share of scores
recomputed. Public names only.
"""

import argparse
import inspect
import statistics
import time


def main() -> None:
    """Time the policies of the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("model", help="a packaged name, a folder or a file")
    parser.add_argument(
        "policies", nargs="+", help="for example ps4+strict:0.1; the first one is the measure"
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5, help="one more, which isn't counted, comes first")
    given = parser.parse_args()

    import torch

    import torchlamp

    model, tokenizer = torchlamp.load(given.model)
    ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, : given.tokens]
    seconds: dict[str, list[tuple[float, float]]] = {policy: [] for policy in given.policies}
    rates: dict[str, float] = {}
    for _ in range(given.turns + 1):
        for policy, times in seconds.items():
            with torchlamp.lookahead(model, policy) as found, torch.no_grad():
                start, busy = time.perf_counter(), time.process_time()
                model(ids)
                times.append((time.perf_counter() - start, time.process_time() - busy))
            rates[policy] = found.recompute_rate
    medians = {
        policy: [statistics.median(t) for t in zip(*ts[1:], strict=True)] for policy, ts in seconds.items()
    }
    first = medians[given.policies[0]]
    print(f"{given.model}, {ids.shape[1]} tokens, {torch.get_num_threads()} threads, {given.turns} turns")
    for policy, found in medians.items():
        times = "".join(f"{t:8.3f} s x {t / one:5.3f}  " for t, one in zip(found, first, strict=True))
        print(f"{policy:44} {times} {rates[policy]:7.2%} recomputed")


if __name__ == "__main__":
    main()
