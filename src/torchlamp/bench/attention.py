"""One token's attention over a long look-ahead cache against torch's own, on keys of a real model.

Every contestant goes through some layers one after the other, twice, and is timed the second time, as decoding does:
its threads are awake, and what it reads is no longer in the caches. Times are per layer.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from torchlamp.bench.real_keys import HeadTensors, real_heads, wider
from torchlamp.bench.turns import Bench, Target, Timing, Watch, interleaved, watch_turns
from torchlamp.decoding.key_value_store import Attended, KeyValueStore, StoreOptions
from torchlamp.models.load import load
from torchlamp.policy.decodable import site_settings
from torchlamp.policy.policy import SitePolicy

#: torch's threads spin for some milliseconds, and there are no more processors than threads.
PAUSE = 0.02
#: A long context spreads the probabilities: thresholds below those of `prepare`, for an error below 1e-3.
SCORES, VALUES = (
    site_settings("scores", SitePolicy.parse("int8.center.hadamard+running:1e-05")),
    site_settings("values", SitePolicy.parse("int8+topz:0.0001")),
)
LOOKAHEAD, OFF = "int8, look-ahead", "int8, look-ahead off"
TORCH = ("torch float32 sdpa", "torch bfloat16 sdpa", "torch float32 matmul")
LAYERS = [4, 9, 14, 19, 24, 29]
_OFF = float("inf")
_ROTATED = StoreOptions(hadamard=True)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """Keys, turns, numbers of keys and recompute rates of the curves."""

    keys: int
    repeats: int
    lengths: tuple[int, ...]
    rates: tuple[float, ...]


WHOLE = Sizes(
    32_768, 41, (128, 512, 2048, 8192, 32_768, 131_072), (0.0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2)
)
QUICK = Sizes(2048, 5, (128, 512, 2048), (0.0, 0.01, 0.1))


def measure(watch: Watch) -> Iterator[Bench]:
    """Both shapes at 32,768 keys; then cost over the number of keys, and over the recompute rate."""
    sizes = QUICK if watch.quick else WHOLE
    watch.step("attention: keys of a real model", 0, 1)
    model, tokenizer = load(watch.model or "smollm2-135m")
    layers = real_heads(model, tokenizer, sizes.keys, LAYERS if watch.model is None else _spread(model))
    query, key = layers[0].q, layers[0].k
    shape = f"{query.shape[1]} heads over {key.shape[1]} key heads of {key.shape[-1]}"
    yield at_length(shape, layers, sizes, watch)
    if watch.model is None:
        wide = [wider(layers[i:] + layers[:i], 8, 4) for i in range(0, len(layers), 2)]
        yield at_length("32 heads over 8 key heads of 128, each of two real ones", wide, sizes, watch)
    yield over_lengths(layers[::2], sizes, watch)
    yield over_rates(layers[::2], sizes, watch)


def _spread(model: Any) -> list[int]:
    """Six layers of a model that see the whole context, or all if there are fewer."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    full = [number for number, kind in enumerate(types) if kind == "full_attention"]
    step = max(1, len(full) // len(LAYERS))
    return full[step - 1 :: step][: len(LAYERS)]


class Contestant:
    """A filled store of one layer; calls attend with its query."""

    def __init__(
        self,
        heads: HeadTensors,
        options: StoreOptions = _ROTATED,
        scores: float = SCORES.threshold,
        values: float = VALUES.threshold,
    ) -> None:
        self.heads, self.store = heads, KeyValueStore(options)
        self.store.append(heads.k, heads.v)
        self.scores, self.values = scores, values

    def at(self, scores: float, values: float) -> "Contestant":
        """The same store with other thresholds."""
        other = copy.copy(self)
        other.scores, other.values = scores, values
        return other

    def __call__(self) -> Attended:
        """Attend with the layer's query."""
        return self.store.attend(
            self.heads.q,
            scaling=self.heads.q.shape[-1] ** -0.5,
            scores_threshold=self.scores,
            values_threshold=self.values,
        )


def timed(
    calls: dict[str, list[Call]],
    sizes: Sizes,
    watch: Watch,
    title: str,
    change: Callable[[list[Timing]], list[Timing]],
) -> list[Timing]:
    """Seconds per layer; `change` makes a table's rows of the timings, and tells the watch."""

    def through(own: list[Call]) -> Callable[[], object]:
        return lambda: [call() for call in own]

    def per_layer(timings: list[Timing]) -> list[Timing]:
        counts = [len(calls[t.label]) for t in timings]
        return change(
            [
                replace(t, median=t.median / n, fastest=t.fastest / n, slowest=t.slowest / n)
                for t, n in zip(timings, counts, strict=True)
            ]
        )

    told = watch_turns(watch, title, sizes.repeats, per_layer)
    with torch.inference_mode():
        found = interleaved(
            {label: through(own) for label, own in calls.items()},
            sizes.repeats,
            pause=PAUSE,
            after_turn=told,
        )
    return per_layer(found)


def at_length(what: str, layers: list[HeadTensors], sizes: Sizes, watch: Watch) -> Bench:
    """Time the attention of all layers, and compare each with float64."""
    title = f"attention of one token, {sizes.keys} keys, {what}"
    variants = {
        LOOKAHEAD: (_ROTATED, SCORES.threshold, VALUES.threshold),
        OFF: (_ROTATED, _OFF, _OFF),
        "int8, not rotated": (StoreOptions(), SCORES.threshold, VALUES.threshold),
        "int8, neither rotated nor centred": (StoreOptions(center=False), SCORES.threshold, VALUES.threshold),
        "int4, look-ahead": (replace(_ROTATED, key_bits=4, value_bits=4), SCORES.threshold, VALUES.threshold),
        "int4, look-ahead off": (replace(_ROTATED, key_bits=4, value_bits=4), _OFF, _OFF),
    }
    calls: dict[str, list[Call]] = torch_calls(layers)
    reference = [exact(heads) for heads in layers]
    errors = {
        label: [relative_error(call(), r) for call, r in zip(own, reference, strict=True)]
        for label, own in calls.items()
    }
    notes: dict[str, str] = {}
    for label, (options, scores, values) in variants.items():
        calls[label] = [Contestant(heads, options, scores, values) for heads in layers]
        found = [call() for call in calls[label]]
        errors[label] = [relative_error(a.output[:, 0], r) for a, r in zip(found, reference, strict=True)]
        rates = [
            sum(a.recomputed for a in found) / sum(a.eligible for a in found),
            sum(a.full_values for a in found) / sum(a.eligible_values for a in found),
        ]
        notes[label] = f"scores {rates[0]:.2%}, values {rates[1]:.2%}, worst error {max(errors[label]):.1e}"

    def with_errors(timings: list[Timing]) -> list[Timing]:
        return [
            replace(t, error=statistics.median(errors[t.label]), note=notes.get(t.label, "")) for t in timings
        ]

    timings = timed(calls, sizes, watch, title, with_errors)
    median = {t.label: t.median for t in timings}
    best = min(median[label] for label in TORCH)
    ratios = [off / on for on, off in zip(errors[LOOKAHEAD], errors[OFF], strict=True)]
    return Bench(
        title,
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


def over_lengths(layers: list[HeadTensors], sizes: Sizes, watch: Watch) -> Bench:
    """Cost over the number of keys; beyond the real ones they are repeated, which costs the same."""
    title = "attention of one token over the number of keys, 9 heads over 3 key heads of 64"
    timings: list[Timing] = []
    for length in sizes.lengths:
        times = -(-length // sizes.keys)
        longer = [
            HeadTensors(h.q, h.k.repeat(1, 1, times, 1), h.v.repeat(1, 1, times, 1)).first(length)
            for h in layers
        ]
        contestants = [Contestant(heads) for heads in longer]
        calls: dict[str, list[Call]] = {**torch_calls(longer), LOOKAHEAD: [*contestants]}
        calls[OFF] = [c.at(_OFF, _OFF) for c in contestants]
        before = timings

        def more(new: list[Timing], before: list[Timing] = before, length: int = length) -> list[Timing]:
            return [*before, *(replace(t, label=f"{length} keys, {t.label}") for t in new)]

        timings = timed(calls, sizes, watch, title, more)
    return Bench(title, timings, [])


def over_rates(layers: list[HeadTensors], sizes: Sizes, watch: Watch) -> Bench:
    """Cost over the share of scores recomputed, values read low-bit; the break-even is with the best of torch."""
    contestants = [Contestant(heads) for heads in layers]
    calls: dict[str, list[Call]] = torch_calls(layers)
    notes: dict[str, str] = {}
    for rate in sizes.rates:
        own = [c.at(_threshold(c, rate), _OFF) for c in contestants]
        label = f"{rate:.1%} of the scores recomputed"
        found = [call() for call in own]
        notes[label] = f"rate {sum(a.recomputed for a in found) / sum(a.eligible for a in found):.4f}"
        calls[label] = [*own]
    title = f"attention of one token over the recompute rate, {sizes.keys} keys"

    def with_rates(timings: list[Timing]) -> list[Timing]:
        return [replace(t, note=notes.get(t.label, "")) for t in timings]

    return Bench(title, timed(calls, sizes, watch, title, with_rates), [])


def torch_calls(layers: list[HeadTensors]) -> dict[str, list[Call]]:
    """Torch's ways in each layer."""
    by_layer = [_torch_calls(heads) for heads in layers]
    return {label: [calls[label] for calls in by_layer] for label in TORCH}


def _torch_calls(heads: HeadTensors) -> dict[str, Call]:
    """Each in its best form: the queries of a group as rows, so that no key is copied or read twice."""
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


def exact(heads: HeadTensors) -> Tensor:
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
        attended = contestant.at(middle, _OFF)()
        low, high = (middle, high) if attended.recomputed / attended.eligible > rate else (low, middle)
    return float((low * high) ** 0.5)
