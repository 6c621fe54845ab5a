"""Time two installations of torchlamp against each other: does a change make anything slower?

    git worktree add ../before REVISION && (cd ../before && make .venv/installed)
    python benchmarks/revisions.py ../before/.venv/bin/python .venv/bin/python

Each installation runs in a process of its own, which loads its models once; then the two take turns, so that both see
the same machine. A line gives the medians over the rounds and their ratio, second / first. Public names only, so that
any two revisions compare.
"""

import argparse
import inspect
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

#: What is timed on a model: a forward of 512 tokens under these policies, and the median step of decoding.
FORWARDS = ("ps4+none", "ps4+strict:0.1", "ps4+running:0.02", "ps7/block32+strict:0.1")
STEPS = 48


def tasks(models: list[str]) -> dict[str, Callable[[], float]]:
    """Seconds of everything that is timed, by name."""
    import torch

    import torchlamp

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(9, 1024, 64, generator=generator)
    b = torch.randn(9, 64, 1024, generator=generator)
    found: dict[str, Callable[[], float]] = {
        f"matmul {name}, 9 x 1024 x 64 x 1024": timed(lambda name=name: torchlamp.matmul(a, b, name))
        for name in ("ps4", "ps7/block32", "e4m3fn")
    }
    text = inspect.getsource(argparse)
    for name in models:
        model, tokenizer = torchlamp.load(name)
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
        for policy in FORWARDS:
            found[f"{name}: forward, {policy}"] = forward(model, ids, policy)
        found[f"{name}: decoding step, 256 keys"] = decoding(model, ids[:, :256])
    return found


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The seconds of one call."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def forward(model: Any, ids: Any, policy: str) -> Callable[[], float]:
    """The seconds of a simulated forward pass."""
    import torch

    import torchlamp

    def run() -> float:
        with torchlamp.lookahead(model, policy), torch.no_grad():
            return timed(lambda: model(ids))()

    return run


def decoding(model: Any, ids: Any) -> Callable[[], float]:
    """The median seconds of a token that a prepared model decodes after a prompt."""
    import torch

    import torchlamp

    @torch.no_grad()
    def run() -> float:
        seconds = []
        with torchlamp.prepare(model) as prepared:
            cache = prepared.cache()
            token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            for _ in range(STEPS):
                start = time.perf_counter()
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    return run


def work(threads: int, models: list[str]) -> None:
    """One process: a line of JSON with the names, then for each line of input the seconds of the task it names."""
    import torch

    torch.set_num_threads(threads)
    found = tasks(models)
    for run in found.values():
        run()
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        print(found[line.rstrip("\n")](), flush=True)


def compare(pythons: list[str], rounds: int, threads: int, models: list[str]) -> None:
    """Start both processes, let them take turns, print the medians."""
    command = [__file__, *pythons, "--work", "--threads", str(threads), "--models", *models]
    workers = [
        subprocess.Popen([p, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for p in pythons
    ]
    names, _ = (json.loads(worker.stdout.readline()) for worker in workers)
    print(f"{'':55} {'first ms':>10} {'second ms':>10} {'ratio':>7}")
    for name in names:
        seconds: list[list[float]] = [[], []]
        for turn in range(2 * rounds):
            which = (turn + 1) // 2 % 2  # first, second, second, first, ...
            workers[which].stdin.write(name + "\n")
            workers[which].stdin.flush()
            seconds[which].append(float(workers[which].stdout.readline()))
        first, second = (1e3 * statistics.median(s) for s in seconds)
        print(f"{name:55} {first:10.4g} {second:10.4g} {second / first:7.3f}", flush=True)
    for worker in workers:
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", help="the Python of one installation")
    parser.add_argument("second", help="that of the other")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.threads, given.models)
    else:
        compare([given.first, given.second], given.rounds, given.threads, given.models)
