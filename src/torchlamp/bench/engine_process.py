"""One engine measured in a process of its own: load, accuracy, prompts, steps, memory.

    python -m torchlamp.bench.engine_process SPEC.json LABEL

prints one line of JSON, the last of its output.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchlamp.bench.decoders import ExactDecoder
from torchlamp.bench.engine_list import ENGINES, REFERENCE, Engine, Reads, Spec
from torchlamp.evaluation.metrics import Comparer


def main(arguments: list[str]) -> None:
    """Measure the engine of this label."""
    given: dict[str, Any] = json.loads(Path(arguments[0]).read_text("utf-8"))
    spec = Spec(**(given | {"contexts": tuple(given["contexts"])}))
    torch.set_num_threads(spec.threads)
    engine = next(engine for engine in ENGINES if engine.label == arguments[1])
    print(json.dumps(measured(engine, spec)), flush=True)


def measured(engine: Engine, spec: Spec) -> dict[str, float]:
    """Every figure of one engine."""
    if engine.reads_gguf:
        engine.make(spec).close()  # quantises, once; the measured load reads what is there
    # What every process holds whatever it runs: Python, torch, transformers and its code of this type of model.
    import transformers

    config = transformers.AutoConfig.from_pretrained(spec.model)
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    base = _resident()
    start = time.perf_counter()
    reads = engine.make(spec)
    figures = {"load_s": time.perf_counter() - start}
    windows = torch.load(spec.windows)
    try:
        with torch.inference_mode():
            figures |= _accuracy(reads, windows, spec, is_reference=engine.label == REFERENCE)
            text = windows.flatten()
            for context in spec.contexts:
                figures |= _speed(reads, text.repeat(-(-spec.length // len(text))), context, spec)
        figures |= {"MB": _resident() - base, "peak_MB": _resident("VmHWM") - base, "base_MB": base}
    finally:
        reads.close()
    return figures


def _accuracy(reads: Reads, windows: Tensor, spec: Spec, *, is_reference: bool) -> dict[str, float]:
    """KL and agreement of the largest logit with the reference, whose process writes its logits down.

    `kl` and `top1` are those of steps, which read the cache as decoding does: `spec.steps` behind the first half of a
    window. `prompt_kl` is that of whole windows read at once, in which a quantised cache isn't read.
    """
    path = Path(spec.reference)
    kept: list[tuple[Tensor, Tensor]] = [] if is_reference else torch.load(path, mmap=True)
    comparer = Comparer()
    found: dict[str, list[Tensor]] = {"prompt_kl": [], "kl": [], "top1": []}
    for number, window in enumerate(windows):
        half = len(window) // 2
        following = window[half : half + spec.steps + 1]
        whole = reads.logits(window[:-1]).float().clone()
        reads.prefill(window[:half])
        steps = torch.stack([reads.step(token).float() for token in following[:-1].tolist()])
        if is_reference:
            kept.append((whole, steps))
        for name, rows, true, targets in (
            ("prompt_kl", whole, kept[number][0], window[1:]),
            ("kl", steps, kept[number][1], following[1:]),
        ):
            metrics = comparer.compare(comparer.reference(true, targets), rows)
            found[name].append(torch.as_tensor(metrics.kl, dtype=torch.float64).clone())
        found["top1"].append(1 - torch.as_tensor(metrics.flips, dtype=torch.float64))
    if is_reference:
        torch.save(kept, path)
    means = torch.stack([values.mean() for values in found["kl"]])
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else 0.0
    return {name: float(torch.cat(values).mean()) for name, values in found.items()} | {"kl_error": error}


def _speed(reads: Reads, text: Tensor, context: int, spec: Spec) -> dict[str, float]:
    """Tokens a second of the prompt and of steps behind it; medians."""
    prompt, following = text[:context], text[context : context + spec.steps].tolist()
    read, steps = [], []
    for _ in range(spec.prompts + 1):  # the first one wakes threads and fills caches
        start = time.perf_counter()
        reads.prefill(prompt)
        read.append(time.perf_counter() - start)
    for token in () if isinstance(reads, ExactDecoder) else following:
        start = time.perf_counter()
        reads.step(token)
        steps.append(time.perf_counter() - start)
    if isinstance(reads, ExactDecoder):  # takes no steps of given tokens, but writes its own
        steps.append(1 / reads.text_rate(prompt, spec.steps))
    first = statistics.median(read[1:])
    return {
        f"first_token_ms_{context}": 1e3 * first,
        f"prompt_tokens/s_{context}": context / first,
        f"decode_tokens/s_{context}": 1 / statistics.median(steps[1:] or steps),
    }


def _resident(kind: str = "VmRSS") -> float:
    """MB of resident memory now, or at most ("VmHWM"): the pages of mapped files that were read included."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:  # no Linux: the most until now
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e3
    line = next(line for line in status.splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main(sys.argv[1:])
