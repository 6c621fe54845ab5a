"""The worked example of docs/adding-a-rule.md, executed: it must work as written and pass every check."""

import re
from pathlib import Path

import pytest
from rule_checks import CHECKS

from torchlamp.rules import RULES, Rule

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-rule.md"


@pytest.fixture
def example(monkeypatch):
    """The page's code, run top to bottom with a registry of its own."""
    monkeypatch.setattr("torchlamp.rules.registry.RULES", dict(RULES))
    blocks = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 4
    names = {"__name__": "adding_a_rule"}
    monkeypatch.setitem(__import__("sys").modules, "adding_a_rule", _Module(names))
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names["Sensitivity"]


class _Module:
    """Lets pickle find the example's class where it says it lives."""

    def __init__(self, names):
        self.__dict__ = names


def test_the_example_is_registered_on_top_of_the_others(example):
    assert isinstance(Rule.parse("sensitivity:0.1"), example)
    with pytest.raises(ValueError, match=r"sensitivity takes a finite number in \[0, 0\.5\]"):
        Rule.parse("sensitivity:0.7")
    assert "sensitivity" not in RULES


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_example_passes_every_check(example, check):
    for spelling in (*example.examples, *(f"random-like:{s}" for s in example.examples)):
        check(Rule.parse(spelling))
