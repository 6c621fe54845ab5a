"""Twenty thousand decoded tokens in one process: memory stays where it is."""

import statistics
import time
from pathlib import Path

import torch

from torchlamp.bench.decoders import PreparedDecoder
from torchlamp.bench.turns import Bench, Target, Timing, Watch
from torchlamp.data.text import cut_windows, default_text
from torchlamp.models.load import load

MODEL, PROMPT = "smollm2-135m", 64
#: Tokens in all and of a sequence, of a whole run and of a quick one.
TOKENS, SEQUENCE = (20_000, 90), (2_000, 30)


def measure(watch: Watch) -> Bench:
    """Decode greedily, a new sequence every 2,000 tokens; resident memory after each sequence."""
    count, sequence = TOKENS[watch.quick], SEQUENCE[watch.quick]
    title = f"soak: {count} decoded tokens, {torch.get_num_threads()} threads"
    model, tokenizer = load(watch.model or MODEL)
    prompts = cut_windows(tokenizer, [default_text()], count // sequence, PROMPT)
    decoder = PreparedDecoder(model, None)
    resident: list[float] = []
    seconds: list[float] = []
    for number, prompt in enumerate(prompts):
        watch.step(title, number * sequence, count)
        decoder.prefill(prompt)
        token = int(prompt[-1])
        start = time.perf_counter()
        for _ in range(sequence):
            token = int(decoder.step(token).argmax())
        seconds.append((time.perf_counter() - start) / sequence)
        resident.append(_resident())
        watch.so_far(Bench(title, [_timing(watch.model or MODEL, sequence, seconds)], []))
    return Bench(
        title,
        [_timing(watch.model or MODEL, sequence, seconds)],
        [
            Target(
                "MB of resident memory more after the last sequence than after the second",
                resident[-1] - resident[1],
                16,
            )
        ],
    )


def _timing(name: str, sequence: int, seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    label = f"{name}, a token of {sequence} after {PROMPT}"
    return Timing(label, median, min(seconds), max(seconds), per_second=1 / median)


def _resident() -> float:
    """Resident MB of this process. OSError where the system has no /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6
