"""`torchlamp bench`: medians of interleaved timings, so that a busy machine slows both sides alike."""

import json as json_module
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.study.environment import environment
from torchlamp.study.output import check_writable, write_text

_REPEATS = 15


def run(name: str, json: Path | None = None) -> dict[str, Any]:
    """Run a benchmark, print its lines, write them as JSON if asked to, and return them.

    Raises
    ------
    ValueError
        An unknown name.
    OSError
        The JSON file can't be written.
    """
    benches: dict[str, Callable[[], dict[str, float]]] = {"scores": _scores, "forward": _forward}
    if name not in benches:
        raise ValueError(f"unknown benchmark {name!r}: use {' or '.join(benches)}")
    if json is not None:
        check_writable(json)
    seconds = benches[name]()
    for label, value in seconds.items():
        print(f"{label:28s} {1e3 * value:10.2f} ms")
    record = {"benchmark": name, "median_seconds": seconds, "environment": environment()}
    if json is not None:
        write_text(json, json_module.dumps(record, indent=2) + "\n")
    return record


def interleaved(calls: dict[str, Callable[[], object]], repeats: int = _REPEATS) -> dict[str, float]:
    """Median seconds of each call, all of them timed in turns after one call that isn't counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def _scores() -> dict[str, float]:
    """Query-key products of SmolLM2's shapes: 9 heads over 3 key heads, 1024 tokens, size 64."""
    from torchlamp.kernels.products import products

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(9, 1024, 64, generator=generator)
    key = torch.randn(3, 1024, 64, generator=generator)
    repeated = key.repeat_interleave(3, dim=0)
    calls: dict[str, Callable[[], object]] = {
        "float32 torch.matmul, full": lambda: torch.matmul(query, repeated.transpose(1, 2))
    }
    for spelling in ("ps4", "e4m3fn"):
        accumulation = Accumulator.parse(spelling).accumulation
        calls[f"{spelling}, causal"] = lambda a=accumulation: products(
            query, key.transpose(1, 2), a, causal=0
        )  # type: ignore[misc]
    return interleaved(calls)


def _forward() -> dict[str, float]:
    """SmolLM2-135M on 1024 tokens: its own float32 attention, and under two policies."""
    from torchlamp.integrations.huggingface import lookahead
    from torchlamp.study.models import load
    from torchlamp.study.text import cut_windows, default_text

    model, tokenizer = load("smollm2-135m")
    tokens = cut_windows(tokenizer, [default_text()], 1, 1024)

    def plain() -> None:
        model(tokens, use_cache=False)

    def under(policy: str) -> Callable[[], None]:
        def call() -> None:
            with lookahead(model, policy):
                model(tokens, use_cache=False)

        return call

    with torch.inference_mode():
        return interleaved(
            {"float32": plain, "ps4+none": under("ps4+none"), "ps4+strict:0.1": under("ps4+strict:0.1")},
            repeats=5,
        )
