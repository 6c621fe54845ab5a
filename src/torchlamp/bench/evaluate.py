"""The share of an evaluation's time outside the forward passes: metrics, statistics, bookkeeping."""

from collections.abc import Callable

from torchlamp.bench.turns import Bench, Target, Timing, Watch
from torchlamp.data.text import cut_windows, default_text
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.evaluation.loop import Progress
from torchlamp.models.load import load

POLICY = "ps4+strict:0.1"
#: Windows and their tokens, of a whole run and of a quick one.
WINDOWS, LENGTH = (3, 2), (512, 64)
#: Model -> the largest share allowed outside the forwards; Gemma 3 has a vocabulary of 262k tokens.
LIMITS = {"smollm2-135m": 0.15, "gemma3-270m": 0.30}


def measure(watch: Watch) -> Bench:
    """Evaluate both packaged models once with all baselines, and compare total with forward time."""
    count, length = WINDOWS[watch.quick], LENGTH[watch.quick]
    title = f"evaluate: {count} windows of {length} tokens, {POLICY} and baselines"
    timings: list[Timing] = []
    targets: list[Target] = []
    limits = LIMITS if watch.model is None else {watch.model: max(LIMITS.values())}
    for name, limit in limits.items():
        watch.step(f"evaluate: {name}", 0, count)
        model, tokenizer = load(name)
        windows = cut_windows(tokenizer, [default_text()], count, length)
        result = evaluate(model, windows, POLICY, model_name=name, progress=_told(watch, name))
        # Of all runs together.
        total, forward = result.seconds, result.forward_seconds
        note = f"only {result.windows} windows" if result.partial else ""
        timings += [
            Timing(f"{name}, all runs", total, total, total, note=note),
            Timing(f"{name}, forward passes", forward, forward, forward, note=note),
        ]
        targets.append(Target(f"{name}: share outside the forwards", 1 - forward / total, limit))
        watch.so_far(Bench(title, timings, targets))
        if result.partial:
            raise KeyboardInterrupt
    return Bench(title, timings, targets)


def _told(watch: Watch, name: str) -> Callable[[Progress], None]:
    return lambda state: watch.step(f"evaluate: {name}", state.windows, state.total_windows)
