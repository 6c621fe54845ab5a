"""The share of an evaluation's time outside the forward passes: metrics, statistics, bookkeeping."""

from torchlamp.bench.turns import Bench, Target, Timing
from torchlamp.data.text import cut_windows, default_text
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.models.load import load

WINDOWS, LENGTH, POLICY = 3, 512, "ps4+strict:0.1"
#: Model -> the largest share allowed outside the forwards; Gemma 3 has a vocabulary of 262k tokens.
LIMITS = {"smollm2-135m": 0.15, "gemma3-270m": 0.30}


def measure() -> Bench:
    """Evaluate both packaged models with all baselines and compare total with forward time."""
    timings, targets = [], []
    for name, limit in LIMITS.items():
        model, tokenizer = load(name)
        windows = cut_windows(tokenizer, [default_text()], WINDOWS, LENGTH)
        result = evaluate(model, windows, POLICY, model_name=name)
        runs = [result, *result.comparisons]
        total = sum(run.seconds for run in runs)
        forward = sum(run.forward_seconds for run in runs)
        timings += [
            Timing(f"{name}, all runs", total, total, total),
            Timing(f"{name}, forward passes", forward, forward, forward),
        ]
        targets.append(Target(f"{name}: share outside the forwards", 1 - forward / total, limit))
    return Bench(f"evaluate: {WINDOWS} windows of {LENGTH} tokens, {POLICY} and baselines", timings, targets)
