"""The worked examples of docs/extending.md, executed: they must work as written, and the rule passes every check."""

import re
import sys
from pathlib import Path

import pytest
import torch
from rule_checks import CHECKS

from torchlamp import Accumulator, Operand, Policy, lookahead, prepare, quantise
from torchlamp.arithmetic.accumulators import NAMED
from torchlamp.arithmetic.operands import BLOCKS
from torchlamp.arithmetic.transforms import TRANSFORMS
from torchlamp.policy.decodable import settings
from torchlamp.policy.sites import SITES
from torchlamp.rules import RULES, Rule

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
REGISTRIES = (RULES, BLOCKS, NAMED, TRANSFORMS, SITES)


class _Module:
    """Lets pickle find the examples' classes where they say they live."""

    def __init__(self, names):
        self.__dict__ = names


@pytest.fixture(scope="module")
def names():
    """What the page's code defines, run top to bottom; the registries are as before afterwards."""
    before = [dict(registry) for registry in REGISTRIES]
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 14
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
    for registry, name in zip(
        REGISTRIES, ("sensitivity", "mxfp4-16", "bf16-adder8", "descend", "queries"), strict=True
    ):
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


def test_the_site_is_one_record(names):
    """It is read in policies, and no other file names it."""
    policy = Policy.parse("queries=ps3+output:0.1, scores=int8")
    assert str(policy) == "scores=int8, queries=ps3+output:0.1"
    with pytest.raises(ValueError, match=r"rule 'sink-recent:4,4' can't run at the site queries"):
        Policy.parse("queries=ps3+sink-recent:4,4")
    with pytest.raises(ValueError, match=r"operand 'int2' at site queries has no decoding kernel"):
        settings(Policy.parse("queries=int2"))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert '"queries"' not in sources


def test_one_module_of_two_sites_is_refused(names):
    llama = names["llama"]
    for attach in (lookahead, prepare):
        with pytest.raises(
            ValueError, match=r"q_proj belongs to the sites qkv and queries: name one of them"
        ):
            attach(llama, "qkv=int8, queries=int8").__enter__()
    assert "forward" not in vars(llama.model.layers[0].self_attn.q_proj)
