"""A whole forward pass of SmolLM2-135M under a policy against the same model's float32 `sdpa`: time and memory."""

import resource
import subprocess
import sys
from collections.abc import Callable

import torch

from torchlamp.bench.turns import Bench, Target, Watch, interleaved, ratio, watch_turns
from torchlamp.data.text import cut_windows, default_text
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.models.load import load

MODEL, POLICY = "smollm2-135m", "ps4+strict:0.1"
#: Tokens, tokens of the run whose memory is measured, and turns: of a whole run and of a quick one.
TOKENS, LONG, REPEATS = (1024, 128), (8192, 512), (9, 2)


def measure(watch: Watch) -> Bench:
    """Time 1024 tokens, interleaved; then the peak memory of 8192 tokens, each in its own process."""
    count, long, repeats = TOKENS[watch.quick], LONG[watch.quick], REPEATS[watch.quick]
    name = watch.model or MODEL
    title = f"forward: {name}, {count} tokens"
    model, tokenizer = load(name)
    tokens = cut_windows(tokenizer, [default_text()], 1, count)

    def under(policy: str) -> Callable[[], object]:
        def call() -> None:
            with lookahead(model, policy):
                model(tokens, use_cache=False)

        return call

    policies = (POLICY, "ps4+none", "ps4+running:0.005", "ps4+all")
    calls: dict[str, Callable[[], object]] = {"float32 sdpa": lambda: model(tokens, use_cache=False)}
    calls |= {policy: under(policy) for policy in policies}
    with torch.inference_mode():
        timings = interleaved(calls, repeats, after_turn=watch_turns(watch, title, repeats))
    peaks = []
    for number, policy in enumerate((POLICY, None)):
        watch.step(f"forward: memory of {long} tokens", number, 2)
        peaks.append(peak_memory(policy, long, name))
    extra = peaks[0] - peaks[1]
    targets = [
        Target(f"{POLICY} / float32 sdpa, {count} tokens", ratio(timings, POLICY, "float32 sdpa"), 1.4),
        Target(f"MB of memory above sdpa's peak, {long} tokens", extra, 300),
    ]
    return Bench(title, timings, targets)


def peak_memory(policy: str | None, tokens: int, name: str = MODEL) -> float:
    """Peak resident MB of a fresh process that loads the model and runs so many tokens; None: float32 `sdpa`."""
    command = [sys.executable, "-m", __name__, policy or "sdpa", str(tokens), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"the memory run of {policy or 'sdpa'} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout)


def _run_once(policy: str, count: int, name: str) -> float:
    """Run so many tokens in this process and return its peak resident MB."""
    model, tokenizer = load(name)
    tokens = cut_windows(tokenizer, [default_text()], 1, count)
    with torch.inference_mode():
        if policy == "sdpa":
            model(tokens, use_cache=False, logits_to_keep=1)
        else:
            with lookahead(model, policy):
                model(tokens, use_cache=False, logits_to_keep=1)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    print(_run_once(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
