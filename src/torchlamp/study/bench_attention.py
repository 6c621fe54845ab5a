"""One token's attention over a long look-ahead cache against torch's own, on keys of a real model."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from torchlamp.compositions.decode_policy import SiteStorage
from torchlamp.compositions.key_value_store import KeyValueStore, StoreOptions
from torchlamp.study.bench import Bench, Target, interleaved
from torchlamp.study.models import load
from torchlamp.study.real_keys import Heads, real_heads, wider

KEYS, REPEATS = 32_768, 41
LENGTHS = (128, 512, 2048, 8192, 32_768, 131_072)
#: A long context spreads the probabilities: thresholds below those of `prepare`, for an error below 1e-3.
SCORES, VALUES = (
    SiteStorage.parse("int8+running:1e-05", "scores"),
    SiteStorage.parse("int8+topz:0.0001", "values"),
)
LOOKAHEAD, OFF = "int8, look-ahead", "int8, look-ahead off"
TORCH = ("torch float32 sdpa", "torch bfloat16 sdpa", "torch float32 matmul")
LAYERS = [4, 9, 14, 19, 24, 29]
_OFF = float("inf")


def measure() -> Iterator[Bench]:
    """Both shapes at 32,768 keys; then cost over the number of keys, and over the recompute rate."""
    model, tokenizer = load("smollm2-135m")
    layers = real_heads(model, tokenizer, KEYS, LAYERS)
    yield at_length("9 heads over 3 key heads of 64", layers)
    wide = [wider(layers[i:] + layers[:i], 8, 4) for i in range(0, len(layers), 2)]
    yield at_length("32 heads over 8 key heads of 128, each of two real ones", wide)
    yield over_lengths(layers[2])
    yield over_rates(layers[2])


class Contestant:
    """A filled store of one layer; calls attend with its query."""

    def __init__(self, heads: Heads, options: StoreOptions) -> None:
        self.heads, self.store = heads, KeyValueStore(options)
        self.store.append(heads.k, heads.v)

    def __call__(self, scores: float = SCORES.threshold, values: float = VALUES.threshold) -> Any:
        """Attend with the layer's query."""
        return self.store.attend(
            self.heads.q,
            scaling=self.heads.q.shape[-1] ** -0.5,
            scores_threshold=scores,
            values_threshold=values,
        )


def at_length(what: str, layers: list[Heads]) -> Bench:
    """Time the first layer's attention; errors over all layers."""
    rotated = StoreOptions(hadamard=True)
    variants = {
        LOOKAHEAD: (rotated, SCORES.threshold, VALUES.threshold),
        OFF: (rotated, _OFF, _OFF),
        "int8, not rotated": (StoreOptions(), SCORES.threshold, VALUES.threshold),
        "int8, neither rotated nor centred": (StoreOptions(center=False), SCORES.threshold, VALUES.threshold),
        "int4, look-ahead": (replace(rotated, key_bits=4, value_bits=4), SCORES.threshold, VALUES.threshold),
        "int4, look-ahead off": (replace(rotated, key_bits=4, value_bits=4), _OFF, _OFF),
    }
    plain = torch_calls(layers[0])
    calls: dict[str, Callable[[], object]] = {**plain}
    errors: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    for label, call in plain.items():
        errors[label] = [relative_error(call(), exact(layers[0]))]
    for label, (options, scores, values) in variants.items():
        found = []
        for number, heads in enumerate(layers):
            contestant = Contestant(heads, options)
            attended = contestant(scores, values)
            found.append(relative_error(attended.output[:, 0], exact(heads)))
            if number == 0:
                calls[label] = lambda c=contestant, s=scores, v=values: c(s, v)  # type: ignore[misc]
                notes[label] = f"scores {attended.recomputed / attended.eligible:.2%}, values "
                notes[label] += f"{attended.full_values / attended.eligible_values:.2%}"
        errors[label] = found
        notes[label] += f", worst error {max(found):.1e}"
    with torch.inference_mode():
        timings = [
            replace(t, error=statistics.median(errors[t.label]), note=notes.get(t.label, ""))
            for t in interleaved(calls, REPEATS)
        ]
    median = {t.label: t.median for t in timings}
    best = min(median[label] for label in TORCH)
    ratios = [off / on for on, off in zip(errors[LOOKAHEAD], errors[OFF], strict=True)]
    return Bench(
        f"attention of one token, {KEYS} keys, {what}",
        timings,
        [
            Target("times faster than the best of torch", best / median[LOOKAHEAD], 3.0, at_least=True),
            Target(
                "relative error of the output, median over layers", statistics.median(errors[LOOKAHEAD]), 1e-3
            ),
            Target("relative error of the output, worst layer", max(errors[LOOKAHEAD]), 1e-3),
            Target(
                "times more accurate than without look-ahead, median",
                statistics.median(ratios),
                5.0,
                at_least=True,
            ),
        ],
    )


def over_lengths(heads: Heads) -> Bench:
    """Cost over the number of keys; beyond the real ones they are repeated, which costs the same."""
    timings = []
    for length in LENGTHS:
        times = -(-length // heads.k.shape[2])
        longer = Heads(heads.q, heads.k.repeat(1, 1, times, 1), heads.v.repeat(1, 1, times, 1)).first(length)
        contestant = Contestant(longer, StoreOptions(hadamard=True))
        calls: dict[str, Callable[[], object]] = {**torch_calls(longer), LOOKAHEAD: contestant}
        calls[OFF] = lambda c=contestant: c(_OFF, _OFF)  # type: ignore[misc]
        with torch.inference_mode():
            timings += [replace(t, label=f"{length} keys, {t.label}") for t in interleaved(calls, REPEATS)]
    return Bench(
        "attention of one token over the number of keys, 9 heads over 3 key heads of 64", timings, []
    )


def over_rates(heads: Heads) -> Bench:
    """Cost over the share of scores recomputed, values read low-bit; the break-even is with the best of torch."""
    contestant = Contestant(heads, StoreOptions(hadamard=True))
    calls: dict[str, Callable[[], object]] = {**torch_calls(heads)}
    notes: dict[str, str] = {}
    for rate in (0.0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2):
        threshold = _threshold(contestant, rate)
        label = f"{rate:.1%} of the scores recomputed"
        attended = contestant(threshold, _OFF)
        notes[label] = f"rate {attended.recomputed / attended.eligible:.4f}"
        calls[label] = lambda c=contestant, t=threshold: c(t, _OFF)  # type: ignore[misc]
    with torch.inference_mode():
        timings = [replace(t, note=notes.get(t.label, "")) for t in interleaved(calls, REPEATS)]
    return Bench(f"attention of one token over the recompute rate, {KEYS} keys", timings, [])


def torch_calls(heads: Heads) -> dict[str, Callable[[], Tensor]]:
    """Torch's ways, each in its best form: the queries of a group as rows, so that no key is copied or read twice."""
    kv_heads, size = heads.k.shape[1], heads.q.shape[-1]
    q = heads.q.view(1, kv_heads, -1, size)
    low = [x.bfloat16() for x in (q, heads.k, heads.v)]

    def matmul() -> Tensor:
        output: Tensor = (q @ heads.k.mT * size**-0.5).softmax(-1) @ heads.v
        return output

    calls = (
        lambda: scaled_dot_product_attention(q, heads.k, heads.v),
        lambda: scaled_dot_product_attention(low[0], low[1], low[2]),
        matmul,
    )
    return dict(zip(TORCH, calls, strict=True))


def exact(heads: Heads) -> Tensor:
    """The attention in float64: (1, heads, size)."""
    q = heads.q.view(1, heads.k.shape[1], -1, heads.q.shape[-1]).double()
    scores = q @ heads.k.double().mT * heads.q.shape[-1] ** -0.5
    output: Tensor = scores.softmax(-1) @ heads.v.double()
    return output.view(1, heads.q.shape[1], -1)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """2-norm of the difference over that of the reference, all heads together."""
    return float((output.double().reshape(reference.shape) - reference).norm() / reference.norm())


def _threshold(contestant: Contestant, rate: float) -> float:
    """The threshold that recomputes about this share of the scores, by bisection."""
    low, high = 1e-12, 1.0
    if rate == 0.0:
        return _OFF
    for _ in range(30):
        middle = (low * high) ** 0.5
        attended = contestant(middle, _OFF)
        low, high = (middle, high) if attended.recomputed / attended.eligible > rate else (low, middle)
    return float((low * high) ** 0.5)
