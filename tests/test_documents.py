"""What the documents say about themselves and about the code: links, anchors, names, options, small examples."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import torchlamp
from torchlamp.bench.run import BENCHMARKS
from torchlamp.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index


def test_the_results_of_the_format_examples():
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    names = {"torch": torch, "torchlamp": torchlamp, "ones": torch.ones(20)}
    examples = re.findall(r"^(torchlamp\.\S.*?)\s+# (\[.*?\]|\d+)", page, flags=re.MULTILINE)
    assert len(examples) == 5
    for code, result in examples:
        expected = torch.tensor(eval(result, {"nan": torch.nan}))
        torch.testing.assert_close(
            eval(code, names), expected.float(), rtol=0, atol=0, equal_nan=True, msg=code
        )


def test_public_names_are_there_and_say_what_they_do():
    for name in torchlamp.__all__:
        found = getattr(torchlamp, name)
        assert isinstance(found, str) or (found.__doc__ and "torchlamp" in found.__module__), name
    for name in set(re.findall(r"\btorchlamp\.(\w+)\(", README)):
        assert name in torchlamp.__all__


def test_the_options_of_the_readme_exist():
    pages = README + (ROOT / "docs" / "first-steps.md").read_text(encoding="utf-8")
    lines = re.findall(r"^torchlamp ([\w-]+)(.*)$", pages, flags=re.MULTILINE)
    assert {command for command, _ in lines} >= {"evaluate", "generate", "bench", "info", "models"}
    for command, arguments in lines:
        if command == "lm-eval":  # its options are the harness's
            continue
        text = CliRunner().invoke(app, [command, "--help"]).stdout
        for option in re.findall(r"--[\w-]+", arguments):
            assert f"{option} " in text, f"{command} {option}"


def test_the_architecture_page_names_what_is_there():
    """Every file that the page names is there and defines the name beside it."""
    page = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    named = re.findall(r"`([\w/]+\.(?:py|hpp|cpp))`(?: `(\w+)`)?", page)
    assert len(named) > 60
    for file, name in named:
        places = [ROOT / "src" / "torchlamp" / file, ROOT / file]
        (path,) = [place for place in places if place.is_file()] or [None]
        assert path is not None, file
        source = path.read_text(encoding="utf-8")
        assert not name or re.search(rf"(^|\s)(def|class|inline void) {name}\b|^{name} = ", source, re.M), (
            file,
            name,
        )


def test_the_arrows_are_those_of_the_contract():
    """Rooms of the page's arrows, bottom first, as import-linter's layers have them."""
    line = re.search(r"^kernels <- [^`]*", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.M)
    contract = re.search(r"^layers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert line
    assert contract
    arrows = [set(re.findall(r"\w+", layer)) for layer in line[0].split("<-")]
    layers = [set(re.findall(r"torchlamp\.(\w+)", layer)) for layer in contract[1].split(",")]
    assert arrows == [layer for layer in layers if layer][::-1]


def test_make_bench_runs_every_benchmark():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = re.search(r"for name in ([\w ]+); do \$\(BIN\)/torchlamp bench \$\$name", makefile)
    assert names
    assert names[1].split() == list(BENCHMARKS)
