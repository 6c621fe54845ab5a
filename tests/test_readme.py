"""README's Python blocks, pasted one after the other into one interpreter."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.llm
def test_the_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    rate = re.search(r"^([\d.]+)% of the scores recomputed", printed, flags=re.M)
    assert rate
    assert f"# {rate[1]}% of so short" in README.read_text(encoding="utf-8")
    assert "low-bit and transposed copies" in printed
