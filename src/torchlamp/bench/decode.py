"""Tokens per second and KL of low-bit decoding beside float32, Q8_0 and Q4_0, on weights that lie on no 4-bit grid.

Every contestant reads the same prompt and then the same tokens, one at a time: eight in a row, as decoding does, then
it's the next one's turn, so that a busy machine slows all alike. The first step of a turn warms up and isn't timed.
The logits of all steps give the KL to the float32 model.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import QuantizedCache

from torchlamp.bench.decoders import Decoder, PreparedDecoder, TransformersDecoder, dynamic_int8
from torchlamp.bench.greedy import greedy
from torchlamp.bench.llama_files import LlamaFiles, llama_files
from torchlamp.bench.off_grid import made_off_grid
from torchlamp.bench.turns import Bench, Target, Timing, Watch
from torchlamp.data.text import context_length, cut_windows, default_text
from torchlamp.evaluation.metrics import Comparer, Reference
from torchlamp.huggingface.prepare import DEFAULT, FAST
from torchlamp.models.load import load
from torchlamp.models.packaged import PACKAGED
from torchlamp.policy.policy import Policy

#: Models and contexts of a whole run; a quick one has the first of each.
MODELS = ("smollm2-135m", "gemma3-270m")
CONTEXTS = (256, 4096)
STEPS, QUICK_STEPS, TURN = 64, 16, 8
REFERENCE, LOOKAHEAD, UNGUARDED = "transformers float32 sdpa", "look-ahead", "the same, look-ahead off"
EIGHT_BITS = "look-ahead, mostly 8 bits"
SPEEDUP, MAX_KL = 2.5, 1e-4
#: Threads that another contestant left spinning have gone to sleep by then.
_PAUSE = 0.003


@dataclass
class Steps:
    """Seconds and KL, in nats, of each step of a contestant."""

    seconds: list[float]
    kl: list[float]
    note: str = ""


def measure(watch: Watch) -> Iterator[Bench]:
    """Both packaged models, off the grid, at both contexts; then greedy texts against float32's."""
    count = QUICK_STEPS if watch.quick else STEPS
    names = MODELS if watch.model is None else (watch.model,)
    for name in names[:1] if watch.quick else names:
        watch.step(f"decode: {name}", 0, 1)
        model, tokenizer = load(name)
        shown = f"{name}, off the grid" if made_off_grid(name, model) else name
        with llama_files(name, model) if name in PACKAGED else nullcontext() as llama:
            for context in contexts(model, count)[: 1 if watch.quick else None]:
                title = f"decode: {shown}, context {context}"
                tokens = cut_windows(tokenizer, [default_text()], 1, context + count + 1)[0]
                made = contestants(model, llama, context + count + 1)
                yield as_bench(title, race(made, tokens, context, count=count, watch=watch, title=title))
        yield greedy(shown, model, tokenizer, watch=watch)


def contexts(model: Any, count: int) -> list[int]:
    """Tokens before the timed ones, none more than the model's context leaves room for."""
    longest = context_length(model)
    most = max(CONTEXTS) if longest is None else longest - count - 1
    return sorted({min(context, most) for context in CONTEXTS})


def contestants(model: Any, llama: LlamaFiles | None, length: int) -> dict[str, Callable[[], Decoder]]:
    """Label -> function that makes the contestant; those whose packages are missing are left out."""
    policy = Policy.parse(DEFAULT)
    made: dict[str, Callable[[], Decoder]] = {
        REFERENCE: lambda: TransformersDecoder(model),
        LOOKAHEAD: lambda: PreparedDecoder(model, policy),
        UNGUARDED: lambda: PreparedDecoder(model, policy.unguarded()),
        EIGHT_BITS: lambda: PreparedDecoder(model, FAST),
    }
    for label, sites in (
        ("only the attention", ("scores", "values")),
        ("only the MLPs", ("mlp_up", "mlp_down")),
        ("only qkv and attention_out", ("qkv", "attention_out")),
        ("only the LM head", ("lm_head",)),
    ):
        alone = policy.without(*(site for site, _ in policy.entries if site not in sites))
        made[label] = lambda alone=alone: PreparedDecoder(model, alone)  # type: ignore[misc]
    made |= _others(model)
    if llama is not None:
        for quantisation in ("Q8_0", "Q4_0"):
            made[f"llama.cpp {quantisation}"] = lambda q=quantisation: llama.decoder(q, length)  # type: ignore[misc]
    return made


def _others(model: Any) -> dict[str, Callable[[], Decoder]]:
    """Other low-bit ways of transformers and torch, where their packages are there: a quantised cache, dynamic int8."""
    made: dict[str, Callable[[], Decoder]] = {}
    # transformers' quantised cache takes models without sliding windows alone.
    windows = set(getattr(model.config, "layer_types", None) or []) - {"full_attention"}
    for backend, package, bits in () if windows else (("hqq", "hqq", 8), ("quanto", "optimum.quanto", 4)):
        try:
            import_module(package)
        except ImportError:
            continue

        def cache(backend: str = backend, bits: int = bits) -> Any:
            return QuantizedCache(backend, model.config, nbits=bits)

        label = f"transformers QuantizedCache, {backend} {bits} bits"
        made[label] = lambda cache=cache: TransformersDecoder(model, cache)  # type: ignore[misc]
    made["torch dynamic int8"] = lambda: TransformersDecoder(dynamic_int8(model))
    return made


def race(
    made: dict[str, Callable[[], Decoder]],
    tokens: Tensor,
    context: int,
    *,
    count: int = STEPS,
    watch: Watch | None = None,
    title: str = "decode",
) -> dict[str, Steps]:
    """Decode `count` of `tokens` after their first `context` with every contestant, step by step in turns.

    The contestant `REFERENCE` must be the first.
    """
    watch = Watch() if watch is None else watch
    decoders: dict[str, Decoder] = {}
    steps = {label: Steps([], []) for label in made}
    try:
        for number, (label, make) in enumerate(made.items()):
            watch.step(f"{title}: prompts", number, len(made))
            decoders[label] = make()
            decoders[label].prefill(tokens[:context])
        comparer = Comparer()
        reference: Reference | None = None
        for begin in range(0, count, TURN):
            watch.step(title, begin, count)
            turn = tokens[context + begin : context + min(begin + TURN, count)]
            for label, decoder in decoders.items():
                rows = _turn(decoder, turn.tolist(), steps[label].seconds)
                if label == REFERENCE:
                    reference = comparer.reference(rows, turn)
                assert reference is not None
                steps[label].kl += comparer.compare(reference, rows).kl.tolist()
            watch.so_far(Bench(title, timings_of(steps), []))
        for label, decoder in decoders.items():
            if isinstance(decoder, PreparedDecoder):
                steps[label].note = str(decoder.prepared.statistics)
    finally:
        for decoder in decoders.values():
            decoder.close()
    return steps


def _turn(decoder: Decoder, tokens: list[int], seconds: list[float]) -> Tensor:
    """Logits after each token, (tokens, vocabulary); adds the seconds of all steps but the first."""
    time.sleep(_PAUSE)
    logits = []
    for number, token in enumerate(tokens):
        start = time.perf_counter()
        logits.append(decoder.step(token))
        if number:
            seconds.append(time.perf_counter() - start)
    # Not between the steps: torch's threads would still be looking for work in the next one.
    return torch.stack(logits)


def timings_of(steps: dict[str, Steps]) -> list[Timing]:
    """A row for each contestant that has made at least two steps."""
    timings = []
    for label, found in steps.items():
        if len(found.kl) < 2:
            continue
        seconds, kl = torch.tensor(found.seconds), torch.tensor(found.kl, dtype=torch.float64)
        median = float(seconds.quantile(0.5))
        timings.append(
            Timing(
                label,
                median,
                float(seconds.min()),
                float(seconds.max()),
                per_second=1 / median,
                kl=float(kl.mean()),
                kl_error=float(kl.std() / len(kl) ** 0.5),
                note=found.note,
            )
        )
    return timings


def as_bench(title: str, steps: dict[str, Steps]) -> Bench:
    """The table of a race, and its targets."""
    timings = timings_of(steps)
    by_label = {timing.label: timing for timing in timings}
    ours = by_label[LOOKAHEAD]
    targets = [
        Target(
            "times the tokens/s of float32", by_label[REFERENCE].median / ours.median, SPEEDUP, at_least=True
        ),
        Target("KL per token", ours.kl or 0.0, MAX_KL),
    ]
    q8 = by_label.get("llama.cpp Q8_0")
    if q8 is not None and q8.kl is not None:
        for timing in (ours, by_label[EIGHT_BITS]):
            targets += [
                Target(
                    f"{timing.label}: times the tokens/s of Q8_0",
                    q8.median / timing.median,
                    1.0,
                    at_least=True,
                ),
                Target(f"{timing.label}: KL / KL of Q8_0", (timing.kl or 0.0) / q8.kl, 1.0),
            ]
    return Bench(title, timings, targets)
