"""The notebooks of the documentation run from top to bottom, on shorter windows than they show."""

import json
from pathlib import Path

import pytest

from torchlamp.rules import RULES

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def run(path: Path) -> dict:
    names: dict = {"__name__": "tutorial"}
    for source in cells(path):
        exec(compile(source.replace("length=128", "length=24"), path.name, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    """What a notebook registers is gone after it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_every_notebook_shows_what_it_printed():
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        found = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert any(cell.get("outputs") for cell in found), path.name


@pytest.mark.llm
def test_the_paper_s_result():
    names = run(FOLDER / "paper.ipynb")
    plain, control = (
        next(r for r in names["result"].comparisons if r.role == role) for role in ("plain", "random-like")
    )
    assert names["result"].kl_mean < plain.kl_mean / 10 < control.kl_mean
    assert names["difference"].kl < 0


@pytest.mark.llm
def test_a_new_rule():
    rates = run(FOLDER / "new-rule.ipynb")["rates"]
    assert rates["sensitivity:0.02"] > rates["sensitivity:0.06"] > 0


@pytest.mark.llm
def test_a_chip_designer_s_question():
    results = run(FOLDER / "chip.ipynb")["results"]
    kl = [results[f"ps{bits}/block32"].kl_mean for bits in (3, 5, 7)]
    assert kl == sorted(kl, reverse=True)
    assert results["ps3/block32.center+strict:0.1"].block_rates["tile_16x16"] > 0


@pytest.mark.llm
def test_a_fast_model(capsys):
    assert run(FOLDER / "fast.ipynb")["statistics"].rates["scores"] > 0
    assert "The capital of France is Paris." in capsys.readouterr().out
