"""Time to the first token of a prompt: float32 and bfloat16 in torch, a prepared model, and llama.cpp's Q8_0.

Every contestant reads the same prompt, in turns, and gives the logits of its last token. The logits of all tokens of a
window of `KL_TOKENS` give the KL to the float32 model. Weights lie on no 4-bit grid where the model came from one.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlamp.bench.decode import EIGHT_BITS, LOOKAHEAD, REFERENCE
from torchlamp.bench.decoders import PreparedDecoder, TransformersDecoder
from torchlamp.bench.llama_files import LlamaFiles, llama_files
from torchlamp.bench.off_grid import made_off_grid
from torchlamp.bench.turns import Bench, Target, Timing, Watch, interleaved, watch_turns
from torchlamp.data.text import context_length, cut_windows, default_text
from torchlamp.evaluation.metrics import Comparer
from torchlamp.huggingface.prepare import DEFAULT, FAST
from torchlamp.kernels import native
from torchlamp.models.load import load
from torchlamp.models.packaged import PACKAGED

#: Models, lengths of prompts and turns of a whole run; a quick one has the first model and length.
MODELS = ("smollm2-135m", "gemma3-270m")
LENGTHS = (512, 2048)
TURNS, QUICK_TURNS = 7, 2
KL_TOKENS = 512
BFLOAT16, Q8 = "transformers bfloat16 sdpa", "llama.cpp Q8_0"
#: Least times float32's and Q8_0's tokens a second, with VNNI and without.
SPEEDUPS = {"avx512_vnni": (2.5, 1.1)}
OTHER_SPEEDUPS = (1.5, 1.0)
MAX_KL, OF_Q8 = 1e-4, 0.2


class Reader(Protocol):
    """Reads prompts."""

    def prefill(self, tokens: Tensor) -> None:
        """Read int64 (length,) tokens and compute the logits of the last one."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits float32 (length, vocabulary) of all tokens."""

    def close(self) -> None:
        """Free its memory."""


def measure(watch: Watch) -> Iterator[Bench]:
    """One part for each model and length."""
    names = MODELS if watch.model is None else (watch.model,)
    for name in names[:1] if watch.quick else names:
        watch.step(f"prompt: {name}", 0, 1)
        model, tokenizer = load(name)
        generic = made_off_grid(name, model)
        with llama_files(name, model) if name in PACKAGED else nullcontext() as llama:
            for length in _lengths(model)[: 1 if watch.quick else None]:
                title = f"prompt: {name}{', off the grid' if generic else ''}, {length} tokens"
                tokens = cut_windows(tokenizer, [default_text()], 1, length + 1)[0]
                turns = QUICK_TURNS if watch.quick else TURNS
                yield race(readers(model, llama, length + 1), tokens, turns, watch, title)


def _lengths(model: Any) -> list[int]:
    """The lengths of prompts, none longer than the model's context."""
    context = context_length(model)
    return sorted({length if context is None else min(length, context) for length in LENGTHS})


def readers(model: Any, llama: LlamaFiles | None, length: int) -> dict[str, Callable[[], Reader]]:
    """Label -> function that makes the contestant, of up to `length` tokens; llama.cpp only where it is installed."""
    made: dict[str, Callable[[], Reader]] = {
        REFERENCE: lambda: TransformersDecoder(model),
        BFLOAT16: lambda: TransformersDecoder(copy.deepcopy(model).to(torch.bfloat16)),
        LOOKAHEAD: lambda: PreparedDecoder(model, DEFAULT),
        EIGHT_BITS: lambda: PreparedDecoder(model, FAST),
    }
    if llama is not None:
        made[Q8] = lambda: llama.decoder("Q8_0", length)
    return made


def race(
    made: dict[str, Callable[[], Reader]],
    tokens: Tensor,
    turns: int,
    watch: Watch | None = None,
    title: str = "prompt",
) -> Bench:
    """Read `tokens` less the last one, int64 (length + 1,), with every contestant `turns` times.

    The contestant `REFERENCE` must be the first.
    """
    watch = Watch() if watch is None else watch
    contestants: dict[str, Reader] = {}
    prompt, window = tokens[:-1], tokens[: KL_TOKENS + 1]
    #: Mean and standard error of each contestant.
    kl: dict[str, tuple[float, float]] = {}

    def with_rates(timings: list[Timing]) -> list[Timing]:
        return [
            replace(t, per_second=len(prompt) / t.median, kl=kl[t.label][0], kl_error=kl[t.label][1])
            for t in timings
        ]

    try:
        comparer, reference = Comparer(), None
        for number, (label, make) in enumerate(made.items()):
            watch.step(f"{title}: KL", number, len(made))
            contestants[label] = make()
            rows = contestants[label].logits(window[:-1]).float()
            if label == REFERENCE:
                reference = comparer.reference(rows, window[1:])
            assert reference is not None
            found = torch.as_tensor(comparer.compare(reference, rows).kl, dtype=torch.float64)
            kl[label] = float(found.mean()), float(found.std() / len(found) ** 0.5)
        calls = {label: _prefill(reader, prompt) for label, reader in contestants.items()}
        timings = interleaved(calls, turns, after_turn=watch_turns(watch, title, turns, with_rates))
    finally:
        for reader in contestants.values():
            reader.close()
    timings = with_rates(timings)
    return Bench(title, timings, _targets({timing.label: timing for timing in timings}))


def _prefill(reader: Reader, prompt: Tensor) -> Callable[[], object]:
    return lambda: reader.prefill(prompt)


def _targets(by_label: dict[str, Timing]) -> list[Target]:
    """The figures that have limits, of the contestants that are there."""
    ours, eight = by_label.get(LOOKAHEAD), by_label.get(EIGHT_BITS)
    if ours is None or eight is None:
        return []
    of_float32, of_q8 = SPEEDUPS.get(native.instruction_set() or "", OTHER_SPEEDUPS)

    def speed(label: str, timing: Timing, other: str, limit: float) -> Target:
        value = by_label[other].median / timing.median
        return Target(f"{label}: times the tokens/s of {other}", value, limit, at_least=True)

    targets = [
        speed(LOOKAHEAD, ours, REFERENCE, of_float32),
        Target(f"{LOOKAHEAD}: KL per token", ours.kl or 0.0, MAX_KL),
        speed(EIGHT_BITS, eight, BFLOAT16, 1.0),
    ]
    q8 = by_label.get(Q8)
    if q8 is not None and q8.kl:
        targets += [
            speed(LOOKAHEAD, ours, Q8, of_q8),
            Target(f"{EIGHT_BITS}: KL / KL of {Q8}", (eight.kl or 0.0) / q8.kl, OF_Q8),
        ]
    return targets
