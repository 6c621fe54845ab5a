"""A whole forward pass of SmolLM2-135M under a policy against the same model's float32 `sdpa`: time and memory."""

import resource
import subprocess
import sys
from collections.abc import Callable

import torch

from torchlamp.bench.turns import Bench, Target, interleaved, ratio
from torchlamp.data.text import cut_windows, default_text
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.models.load import load

MODEL, TOKENS, POLICY = "smollm2-135m", 1024, "ps4+strict:0.1"
LONG = 8192
REPEATS = 9


def measure() -> Bench:
    """Time 1024 tokens, interleaved; then the peak memory of 8192 tokens, each in its own process."""
    model, tokenizer = load(MODEL)
    tokens = cut_windows(tokenizer, [default_text()], 1, TOKENS)

    def under(policy: str) -> Callable[[], object]:
        def call() -> None:
            with lookahead(model, policy):
                model(tokens, use_cache=False)

        return call

    policies = (POLICY, "ps4+none", "ps4+running:0.005", "ps4+all")
    calls: dict[str, Callable[[], object]] = {"float32 sdpa": lambda: model(tokens, use_cache=False)}
    calls |= {policy: under(policy) for policy in policies}
    with torch.inference_mode():
        timings = interleaved(calls, REPEATS)
    extra = peak_memory(POLICY) - peak_memory(None)
    targets = [
        Target(f"{POLICY} / float32 sdpa, {TOKENS} tokens", ratio(timings, POLICY, "float32 sdpa"), 1.4),
        Target(f"MB of memory above sdpa's peak, {LONG} tokens", extra, 300),
    ]
    return Bench(f"forward: {MODEL}, {TOKENS} tokens", timings, targets)


def peak_memory(policy: str | None) -> float:
    """Peak resident MB of a fresh process that loads the model and runs 8192 tokens; None: float32 `sdpa`."""
    command = [sys.executable, "-m", __name__, policy or "sdpa"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"the memory run of {policy or 'sdpa'} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout)


def _run_once(policy: str) -> float:
    """Run 8192 tokens in this process and return its peak resident MB."""
    model, tokenizer = load(MODEL)
    tokens = cut_windows(tokenizer, [default_text()], 1, LONG)
    with torch.inference_mode():
        if policy == "sdpa":
            model(tokens, use_cache=False, logits_to_keep=1)
        else:
            with lookahead(model, policy):
                model(tokens, use_cache=False, logits_to_keep=1)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    print(_run_once(sys.argv[1]))
