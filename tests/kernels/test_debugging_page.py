import os
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/debugging-kernels.md"


def test_the_example_runs_and_finds_no_difference(monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.setenv("TORCHLAMP_KERNELS", os.environ.get("TORCHLAMP_KERNELS", ""))  # restored afterwards
    names = {}
    exec(code, names)
    assert names["differs"].shape == (1, 48, 100)
    assert capsys.readouterr().out == "tensor([], size=(0, 3), dtype=torch.int64)\n"
