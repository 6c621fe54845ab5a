"""What the tests of sweeps share: a small study of the tiny model, and its results without times."""

import json
from pathlib import Path
from typing import Any

import torch

from tiny import TEXT
from torchlamp.sweep.config import SweepConfig, read_config
from torchlamp.sweep.folder import open_folder, read_results
from torchlamp.sweep.run import LocalEngine, Summary, sweep

STUDY = """
models: MODEL
texts: FOX
windows: 2
window_length: 24
threads: 1
grids:
- accumulate: [ps2, ps3]
  tokens: [real, shuffled]
  rules:
  - none
  - {name: strict, thresholds: [0.03, 0.3]}
  - random:0.2
  - {name: strict, target_rates: [0.1]}
- layers: each
  policies: ["ps2+running:0.01"]
"""
POINTS = 2 * 2 * 5 + 2


def write_study(folder: Path, model: Path, text: str = STUDY) -> Path:
    """The configuration, beside the text that it names."""
    (folder / "fox.txt").write_text(TEXT)
    path = folder / "study.yaml"
    path.write_text(text.replace("MODEL", str(model)).replace("FOX", str(folder / "fox.txt")))
    return path


def make_study(folder: Path, model: Path, text: str = STUDY) -> SweepConfig:
    return read_config(write_study(folder, model, text))


def run_sweep(config: SweepConfig, output: Path, **options: Any) -> Summary:
    """In this process; leaves torch's threads as they were."""
    threads = torch.get_num_threads()
    try:
        with open_folder(output) as folder:
            return sweep(config, folder, LocalEngine(config), **options)
    finally:
        torch.set_num_threads(threads)


def figures(output: Path) -> dict[str, Any]:
    """Every record by its key, without what depends on time."""
    found = {}
    for record in read_results(output):
        del record["seconds"]
        for name in ("seconds", "forward_seconds", "environment"):
            (record["result"] or {}).pop(name, None)
        found[record["key"]] = record
    return found


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
