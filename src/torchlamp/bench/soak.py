"""Twenty thousand decoded tokens in one process: memory stays where it is."""

import statistics
import time
from pathlib import Path

import torch

from torchlamp.bench.decoders import PreparedDecoder
from torchlamp.bench.turns import Bench, Target, Timing
from torchlamp.data.text import cut_windows, default_text
from torchlamp.models.load import load

MODEL, TOKENS, SEQUENCE, PROMPT = "smollm2-135m", 20_000, 2_000, 64


def measure() -> Bench:
    """Decode greedily, a new sequence every 2,000 tokens; resident memory after each sequence."""
    model, tokenizer = load(MODEL)
    prompts = cut_windows(tokenizer, [default_text()], TOKENS // SEQUENCE, PROMPT)
    decoder, resident, seconds = PreparedDecoder(model, None), [], []
    for prompt in prompts:
        decoder.prefill(prompt)
        token = int(prompt[-1])
        start = time.perf_counter()
        for _ in range(SEQUENCE):
            token = int(decoder.step(token).argmax())
        seconds.append((time.perf_counter() - start) / SEQUENCE)
        resident.append(_resident())
    median = statistics.median(seconds)
    label = f"{MODEL}, a token of {SEQUENCE} after {PROMPT}"
    return Bench(
        f"soak: {TOKENS} decoded tokens, {torch.get_num_threads()} threads",
        [Timing(label, median, min(seconds), max(seconds), per_second=1 / median)],
        [
            Target(
                "MB of resident memory more after the last sequence than after the second",
                resident[-1] - resident[1],
                16,
            )
        ],
    )


def _resident() -> float:
    """Resident MB of this process. OSError where the system has no /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6
