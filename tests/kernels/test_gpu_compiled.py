"""The kernels for GPUs compile, and into what they say: no contraction that the source doesn't name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_every_kernel_compiles_without_a_gpu():
    pytest.importorskip("triton", reason="needs Triton: pip install 'torchlamp[gpu]'")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--compile", "90", "--quick"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("products")]
    # Kernel, fused multiply-adds, products on their own: of strict sums all are fused, of others none.
    counts = {line[1]: (int(line[2]), int(line[3])) for line in lines}
    assert counts["ps4"][0] > 0
    assert counts["ps4/unfused"][0] == 0 < counts["ps4/unfused"][1]
    assert "attention" in done.stdout
