"""A sweep's folder made of real evaluations of the tiny model, in the documented layout."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from torchlamp.evaluation.evaluate import evaluate

RULES = ("strict", "running", "random")
THRESHOLDS = {"strict": (10, 4, 1), "running": (0.5, 0.2, 0.05), "random": (0.005, 0.02, 0.07)}


def policies() -> list[tuple[str, list[int] | None]]:
    """Curves of three rules at two accumulators, uniform precision, single layers."""
    found: list[tuple[str, list[int] | None]] = [(f"ps{mu}+none", None) for mu in (2, 3, 4, 7)]
    found += [(f"ps{mu}+{rule}:{t}", None) for mu in (2, 3) for rule in RULES for t in THRESHOLDS[rule]]
    found += [(f"mlp_up=ps{mu}+none", None) for mu in (3, 7)]
    found += [(f"ps3.center{rule}", None) for rule in ("+none", "+strict:4", "+strict:1")]
    return found + [("ps3+none", [layer]) for layer in (0, 1)]


def point_line(point: dict[str, Any], result: Any, error: str | None = None) -> str:
    key = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:16]
    record = {
        "schema": "torchlamp-sweep/1",
        "key": key,
        "point": point,
        "status": "failed" if error else "done",
        "error": error,
        "seconds": 0.1,
        "result": result,
    }
    return json.dumps(record) + "\n"


def point_of(policy: str, **changes: Any) -> dict[str, Any]:
    point = {
        "model": "tiny", "text": "prose", "tokens": "real", "windows": 3, "window_length": 40, "policy": policy,
        "layers": None, "seed": 0, "target_rate": None, "calibration": None,
    }  # fmt: skip
    return point | changes


ALL_GROUPS = (("prose", "real", 0), ("prose", "shuffled", 1), ("code", "real", 2))


def write_sweep(model: Any, folder: Path, groups: Any = ALL_GROUPS) -> Path:
    """The points of each (text, tokens, seed of the tokens), and one that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for text, tokens, seed in groups:
        windows = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(seed))
        for policy, layers in policies():
            result = evaluate(
                model,
                windows,
                policy,
                baselines=False,
                model_name="tiny",
                text=text,
                layers=layers,
                blocks=True,
            )
            lines.append(
                point_line(point_of(policy, text=text, tokens=tokens, layers=layers), result.to_dict())
            )
    lines.append(point_line(point_of("ps4+strict:0.3"), None, "CUDA is away"))
    (folder / "results.jsonl").write_text("".join(lines))
    return folder
