"""Every registered rule through every check: a new rule is tested by being registered."""

import pytest
from rule_checks import CHECKS

from torchlamp.rules import RULES, Rule

# Rules that look through elementwise functions or online softmaxes see another kind of tile: test_condition.py,
# test_lamp_attention.py.
SPELLINGS = [
    e
    for rule in RULES.values()
    if rule.looks_through not in ("elementwise", "online", "blocks")
    for e in rule.examples
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_rule(spelling, check):
    check(Rule.parse(spelling))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_described(name):
    rule = RULES[name]
    assert rule.examples, "a rule without examples would escape the checks"
    assert all(isinstance(Rule.parse(spelling), rule) for spelling in rule.examples)
    assert [str(Rule.parse(spelling)) for spelling in rule.examples] == list(rule.examples)
    assert rule.__doc__.startswith(f"`{name}")
    assert "ource" in rule.__doc__ or name in ("none", "all")
