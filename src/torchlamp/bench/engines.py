"""Every engine on one model: speed of prompts and steps at two contexts, accuracy, memory, load; one row each.

Each engine runs in a process of its own, one after the other: an engine that fails, or isn't installed, is a row with
the reason or the command, not the end. Weights that came from a file of 4 bits are made generic first (`off_grid`);
others stay as they are. Speeds of rows taken minutes apart compare to what the machine allows: `bench decode` and
`bench prompt` time fewer contestants in turns.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from torchlamp.bench.engine_list import ELSEWHERE, ENGINES, REFERENCE, Engine, Spec
from torchlamp.bench.gguf_export import write_gguf
from torchlamp.bench.off_grid import made_off_grid
from torchlamp.bench.turns import Bench, Timing, Watch
from torchlamp.data.text import context_length, cut_windows, default_text
from torchlamp.models.load import load
from torchlamp.models.packaged import PACKAGED

MODEL = "smollm2-135m"
#: Contexts, timed steps, prompts, windows and their length: of a whole run and of a quick one.
CONTEXTS, STEPS, PROMPTS = ((256, 2048), (64,)), (32, 4), (3, 1)
WINDOWS, LENGTH = (4, 2), (512, 64)
#: Seconds that one engine may take.
LIMIT = (600, 300)


def measure(watch: Watch) -> Iterator[Bench]:
    """One part: a row for each engine."""
    quick, name = watch.quick, watch.model or MODEL
    with tempfile.TemporaryDirectory(prefix="torchlamp-") as folder:
        watch.step(f"engines: {name}", 0, len(ENGINES))
        spec, generic, contexts = prepared_spec(name, Path(folder), quick)
        title = f"engines: {name}{', off the grid' if generic else ''}, {spec.threads} threads"
        rows: list[Timing] = []
        absent: dict[str, str] = {}
        for number, engine in enumerate(ENGINES):
            watch.step(f"engines: {engine.label}", number, len(ENGINES))
            try:
                rows.append(row(engine.label, run(engine, spec, LIMIT[quick]), contexts))
            except EngineError as error:
                if engine.label == REFERENCE:
                    raise OSError(f"{REFERENCE}: {error}") from error
                absent[engine.label] = str(error)
            watch.so_far(Bench(title, rows, [], absent))
        yield Bench(title, rows, [], absent | ELSEWHERE)


class EngineError(Exception):
    """One line: why an engine has no figures."""


def prepared_spec(name: str, folder: Path, quick: bool) -> tuple[Spec, bool, tuple[int, ...]]:
    """Write down what the engines share; also whether the weights were changed, and the contexts."""
    model, tokenizer = load(name)
    generic = made_off_grid(name, model)
    where = name
    if generic or name in PACKAGED or name.endswith(".gguf"):
        where = str(folder / "model")
        model.save_pretrained(where)
        tokenizer.save_pretrained(where)
    longest = context_length(model)
    most = None if longest is None else longest - STEPS[quick] - 1
    contexts = tuple(sorted({context if most is None else min(context, most) for context in CONTEXTS[quick]}))
    windows = folder / "windows.pt"
    torch.save(cut_windows(tokenizer, [default_text()], WINDOWS[quick], LENGTH[quick] + 1), windows)
    gguf: Path | None = folder / "F32.gguf"
    if any(engine.reads_gguf and engine.missing() is None for engine in ENGINES):
        try:
            write_gguf(model, folder / "F32.gguf")
        except ValueError:
            gguf = None
    spec = Spec(
        where, None if gguf is None else str(gguf), str(folder), str(windows), str(folder / "reference.pt"), contexts,
        STEPS[quick], PROMPTS[quick], torch.get_num_threads(),
    )  # fmt: skip
    return spec, generic, contexts


def run(engine: Engine, spec: Spec, limit: float) -> dict[str, float]:
    """The figures of an engine, from a process of its own.

    Raises
    ------
    EngineError
        It isn't installed, failed, or took more than `limit` seconds.
    """
    if (module := engine.missing()) is not None:
        raise EngineError(f"{module} isn't installed: {engine.install}")
    told = Path(spec.folder) / "spec.json"
    told.write_text(json.dumps(asdict(spec)), "utf-8")
    # Copies that the engines keep on disk go with the weights.
    environment = os.environ | {"TORCHLAMP_CACHE": str(Path(spec.folder) / "cache")}
    for _ in range(2 if engine.loads_twice else 1):
        command = [sys.executable, "-m", "torchlamp.bench.engine_process", str(told), engine.label]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"failed: took more than {limit:g} seconds") from None
        if done.returncode:
            raise EngineError(f"failed: {_reason(done)}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        return f"the process was ended by signal {-done.returncode}"
    return lines[-1][:300] if lines else f"the process ended with {done.returncode}"


def row(label: str, figures: dict[str, float], contexts: tuple[int, ...]) -> Timing:
    """A row of the table; its time is that of a step at the first context."""
    rate = figures[f"decode_tokens/s_{contexts[0]}"]
    kl, error = figures.pop("kl"), figures.pop("kl_error")
    step = 1 / rate
    return Timing(label, step, step, step, per_second=rate, kl=kl, kl_error=error, figures=figures)
