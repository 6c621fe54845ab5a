"""`torchlamp bench`: runs a benchmark, shows how far it is, and keeps every figure that is there when it is stopped."""

import json as json_module
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torchlamp.bench.progress import progress
from torchlamp.bench.table import print_bench
from torchlamp.bench.turns import Bench, Watch
from torchlamp.evaluation.environment import environment, kernels
from torchlamp.results.output import check_writable, write_text

#: Benchmark -> the module whose `measure(watch)` returns a `Bench`, or yields several.
BENCHMARKS = {
    "scores": "torchlamp.bench.scores",
    "forward": "torchlamp.bench.forward",
    "evaluate": "torchlamp.bench.evaluate",
    "attention": "torchlamp.bench.attention",
    "prompt": "torchlamp.bench.prompt",
    "decode": "torchlamp.bench.decode",
    "engines": "torchlamp.bench.engines",
    "soak": "torchlamp.bench.soak",
}
#: Seconds between two writings of a part that is being measured: the disk shouldn't show in the timings.
_WRITE_EVERY = 10.0


def run(name: str, json: Path | None = None, *, quick: bool = False, model: str | None = None) -> list[Bench]:
    """Run a benchmark, print its tables and targets, and write them as JSON if asked to.

    Parts are printed and written as they are done. A KeyboardInterrupt prints and writes the figures that the part
    under way has so far, with ``"partial": true``, and is raised again.

    Parameters
    ----------
    name : str
        A key of `BENCHMARKS`.
    json : Path, optional
        The file to write.
    quick : bool
        Few and small measurements, whose figures aren't judged.
    model : str, optional
        A short name, a folder, a hub name or a .gguf file; None: the benchmark's own models. Figures of another model
        aren't judged.

    Returns
    -------
    list of Bench
        Every part.

    Raises
    ------
    ValueError
        An unknown name, or a model that the benchmark can't measure.
    OSError
        The JSON file can't be written.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}: allowed are {', '.join(BENCHMARKS)}")
    if json is not None:
        check_writable(json)
    record = _Record(name, json, judged=not quick and model is None, quick=quick)
    try:
        with progress(name) as step:
            measured: Bench | Iterable[Bench] = import_module(BENCHMARKS[name]).measure(
                Watch(quick, model, step, record.so_far)
            )
            for bench in [measured] if isinstance(measured, Bench) else measured:
                record.add(bench)
    except KeyboardInterrupt:
        record.stop()
        raise
    print(_footer(record.where))
    return record.done


class _Record:
    """The parts of a benchmark, as they come."""

    def __init__(self, name: str, json: Path | None, *, judged: bool, quick: bool) -> None:
        self.name, self.json, self.judged, self.quick = name, json, judged, quick
        self.where = environment()
        self.done: list[Bench] = []
        self._under_way: Bench | None = None
        self._written = time.monotonic()

    def so_far(self, bench: Bench) -> None:
        """Note the figures of the part that is being measured."""
        self._under_way = bench
        if time.monotonic() - self._written > _WRITE_EVERY:
            self._write(partial=True)

    def add(self, bench: Bench) -> None:
        """Print and write a part that is done."""
        if not self.judged:
            bench = replace(bench, targets=[replace(target, judged=False) for target in bench.targets])
        self.done.append(bench)
        self._under_way = None
        print_bench(bench)
        self._write(partial=False)

    def stop(self) -> None:
        """Print and write what there is of the part under way."""
        if self._under_way is not None:
            print_bench(self._under_way, partial=True)
        if self.done or self._under_way is not None:
            self._write(partial=True)

    def _write(self, partial: bool) -> None:
        self._written = time.monotonic()
        if self.json is None:
            return
        parts = [
            {
                "title": bench.title,
                "timings": [asdict(t) for t in bench.timings],
                "absent": bench.absent,
                "targets": [asdict(t) | {"met": t.met if t.judged else None} for t in bench.targets],
            }
            for bench in [*self.done, *([] if self._under_way is None else [self._under_way])]
        ]
        # One part stands at the top level, as it did before there were several.
        inner: dict[str, Any] = parts[0] if len(parts) == 1 else {"parts": parts}
        whole = {"benchmark": self.name, **inner, "quick": self.quick, "partial": partial}
        whole |= {"kernels": kernels(), "environment": self.where}
        write_text(self.json, json_module.dumps(whole, indent=2) + "\n")


def _footer(where: dict[str, Any]) -> str:
    known = kernels()
    states = ", ".join(f"{name} {state}" for name, state in known["features"].items())
    threads = f"{where['threads']} thread{'' if where['threads'] == 1 else 's'}"
    return f"{where['cpu']}, {threads}, kernels: {states or known['why_not']}"
