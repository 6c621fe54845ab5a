"""What a result was computed with: versions, threads, processor, kernels."""

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import torchlamp
from torchlamp.kernels import native

#: Instruction sets worth naming, as /proc/cpuinfo spells them on x86-64 and on Arm.
_NOTABLE = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Everything a reader of a result needs to judge or repeat it, ready for JSON."""
    import numpy as np
    import transformers

    return {
        "torchlamp": torchlamp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "kernels": "native" if native.available() else "torch twins",
        "instruction_set": native.instruction_set(),
        "git": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def kernels() -> dict[str, Any]:
    """Which kernels run on this machine, and why the others don't."""
    available = native.available()
    return {
        "native": available,
        "why_not": None if available else native.why_not(),
        "features": dict(native.features()) if available else {},
    }


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system doesn't tell."""
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Notable instruction sets of the processor; empty where the system doesn't tell."""
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            present = set(value.split())
            return [feature for feature in _NOTABLE if feature in present]
    return []


def git_commit() -> str | None:
    """Commit of the source checkout this package runs from, with '+' if files differ; else None."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists() or not (root / "src" / "torchlamp").is_dir():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
