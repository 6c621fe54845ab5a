"""Query-key products of SmolLM2's shapes: 9 heads over 3 key heads, 1024 tokens, size 64."""

from collections.abc import Callable

import torch

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.bench.turns import Bench, Target, Watch, interleaved, ratio, watch_turns
from torchlamp.kernels.dispatch import native_for
from torchlamp.kernels.products import products, products_native
from torchlamp.models.load import load

HEADS, KEY_HEADS, SIZE = 9, 3, 64
#: Tokens and turns, of a whole run and of a quick one.
LENGTH, REPEATS = (1024, 256), (31, 5)


def measure(watch: Watch) -> Bench:
    """Time rounded causal scores against torch's float32 product, full and not causal."""
    length, repeats = LENGTH[watch.quick], REPEATS[watch.quick]
    heads, key_heads, size = _shapes(watch.model)
    title = f"scores: {heads}/{key_heads} heads, {length} tokens, size {size}"
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(heads, length, size, generator=generator)
    key = torch.randn(key_heads, length, size, generator=generator)
    repeated = key.repeat_interleave(heads // key_heads, dim=0).transpose(1, 2)
    keys = key.transpose(1, 2)
    out = torch.empty(heads, length, length)
    steps = heads * length * (length + 1) / 2 * size

    calls: dict[str, Callable[[], object]] = {"float32 q @ k.T, full": lambda: query @ repeated}
    work: dict[str, float] = {}

    def add(label: str, call: Callable[[], object]) -> None:
        calls[label] = call
        work[label] = steps

    for spelling in ("ps4", "ps7/block32", "e4m3fn"):
        accumulation = Accumulator.parse(spelling).accumulation
        add(f"{spelling}, causal", lambda a=accumulation: products(query, keys, a, causal=0))  # type: ignore[misc]
    ps4 = Accumulator.parse("ps4").accumulation
    add("ps4 with sums of squares, causal", lambda: products(query, keys, ps4, causal=0, squares=True))
    native = native_for()
    if native is not None:  # without the cost of fresh memory
        calls["float32, full, into old memory"] = lambda: torch.matmul(query, repeated, out=out)
        add(
            "ps4, causal, into old memory",
            lambda: products_native(native, query, keys, ps4, None, 0, False, out),
        )
    with torch.inference_mode():
        timings = interleaved(
            calls, repeats if native is not None else 1, work, after_turn=watch_turns(watch, title, repeats)
        )

    rate = {t.label: t.gfma or 0.0 for t in timings}
    targets = [
        Target("ps4 causal / float32 full", ratio(timings, "ps4, causal", "float32 q @ k.T, full"), 1.0),
        Target("ps4 causal, G rounded FMA/s", rate["ps4, causal"], 16.0, at_least=True),
        Target("e4m3fn / ps4", ratio(timings, "e4m3fn, causal", "ps4, causal"), 2.5),
    ]
    return Bench(title, timings, targets)


def _shapes(name: str | None) -> tuple[int, int, int]:
    """Heads, key heads and their size: SmolLM2's, or those of a model."""
    if name is None:
        return HEADS, KEY_HEADS, SIZE
    config = load(name)[0].config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(size)
