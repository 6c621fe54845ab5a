"""The worked examples of docs/extending.md, executed: they must work as written, and the rule passes every check."""

import re
import sys
from pathlib import Path

import pytest
import torch
from rule_checks import CHECKS

from torchlamp import Accumulator, Operand, Policy, quantise
from torchlamp.arithmetic.accumulators import NAMED
from torchlamp.arithmetic.operands import BLOCKS
from torchlamp.arithmetic.transforms import TRANSFORMS
from torchlamp.rules import RULES, Rule

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
REGISTRIES = (RULES, BLOCKS, NAMED, TRANSFORMS)


class _Module:
    """Lets pickle find the examples' classes where they say they live."""

    def __init__(self, names):
        self.__dict__ = names


@pytest.fixture(scope="module")
def names():
    """What the page's code defines, run top to bottom; the registries are as before afterwards."""
    before = [dict(registry) for registry in REGISTRIES]
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 12
    names = {"__name__": "extending"}
    sys.modules["extending"] = _Module(names)
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        yield names
    finally:
        del sys.modules["extending"]
        for registry, entries in zip(REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(entries)


def test_each_registry_has_one_entry_more(names):
    for registry, name in zip(REGISTRIES, ("sensitivity", "mxfp4-16", "bf16-adder8", "descend"), strict=True):
        assert list(registry)[-1] == name


def test_the_rule_is_read_and_checked(names):
    assert isinstance(Rule.parse("sensitivity:0.1"), names["Sensitivity"])
    with pytest.raises(ValueError, match=r"sensitivity takes a finite number in \[0, 0\.5\]"):
        Rule.parse("sensitivity:0.7")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_rule_passes_every_check(names, check):
    examples = names["Sensitivity"].examples
    for spelling in (*examples, *(f"random-like:{example}" for example in examples)):
        check(Rule.parse(spelling))


def test_all_four_in_one_policy(names):
    spelling = "mxfp4-16@bf16-adder8.descend+sensitivity:0.1"
    policy = Policy.parse(spelling)
    assert str(policy) == spelling
    assert policy.sites["scores"].precision.accumulator == Accumulator.parse("bf16/block8")


def test_the_block_format_is_a_power_of_two_times_an_element(names):
    """Each stored number is e2m1 times the power of two that the OCP specification gives for its block."""
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 9, 48)
    stored = quantise(x, Operand.parse("mxfp4-16"))
    elements = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}
    for block, group in zip(stored.view(-1, 16).tolist(), x.view(-1, 16).abs().amax(-1), strict=True):
        scale = 2.0 ** (int(torch.frexp(group).exponent) - 1 - 2)
        assert {abs(number) / scale for number in block} <= elements
        assert max(abs(number) / scale for number in block) >= 4


def test_the_table_of_a_site_is_complete():
    """The files that the page lists are those that name the site qkv, and the one that finds its modules."""
    section = PAGE.read_text(encoding="utf-8").split("\n## A site\n")[1]
    listed = set(re.findall(r"^\| \[`[^`]+`\]\(\.\./src/torchlamp/([^)]+)\)", section, re.MULTILINE))
    sources = ROOT / "src" / "torchlamp"
    naming = {
        str(path.relative_to(sources))
        for path in sources.rglob("*.py")
        if '"qkv"' in path.read_text(encoding="utf-8")
    }
    assert listed == naming | {"huggingface/sites.py"}
    assert "def qkv(" in (sources / "huggingface" / "sites.py").read_text(encoding="utf-8")
