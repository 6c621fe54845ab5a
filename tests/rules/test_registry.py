from dataclasses import dataclass

import pytest
import torch

from torchlamp.rules import RULES, Rule, Strict, register, rule_class, rule_names


def test_names_are_those_of_the_design():
    names = "none all strict relaxed relaxed-length mass budget running topz random random-like sink-recent"
    assert set(names.split()) <= set(rule_names())
    assert all(rule_class(name).name == name for name in rule_names())


def test_a_registered_rule_is_understood_everywhere(monkeypatch):
    monkeypatch.setattr("torchlamp.rules.registry.RULES", dict(RULES))

    @register
    @dataclass(frozen=True)
    class First(Rule):
        name = "first"
        examples = ("first",)

        def select(self, tile):
            selected = torch.zeros_like(tile.visible)
            selected[..., :1] = True
            return selected & tile.visible

    assert Rule.parse("first") == First()
    assert str(Rule.parse("random-like:first")) == "random-like:first"
    with pytest.raises(ValueError, match=r"the rules are .*, first"):
        Rule.parse("last")
    assert register(First) is First


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setattr("torchlamp.rules.registry.RULES", dict(RULES))
    other = type("Other", (Strict,), {"name": "strict"})
    with pytest.raises(ValueError, match="rule name 'strict' is taken by Strict"):
        register(other)


@pytest.mark.parametrize("name", ["", "a:b", "a b", "a=b", "a+b", "a,b"])
def test_a_name_must_survive_a_spelling(name):
    with pytest.raises(ValueError, match="must be a word"):
        register(type("Other", (Strict,), {"name": name}))


def test_every_rule_has_a_role():
    by_role = {}
    for name, kind in RULES.items():
        by_role.setdefault(Rule.parse(kind.examples[0]).role, set()).add(name)
    assert by_role["control"] == {"none", "all", "random", "random-like"}
    assert by_role["oracle"] == {"oracle", "oracle-residual"}
    assert by_role["static"] == {"heads", "sink-recent", "first-layers"}
    published = {
        "strict",
        "relaxed",
        "relaxed-length",
        "mass",
        "budget",
        "condition",
        "lamp-attention",
        "thrift",
    }
    assert by_role["published"] == published
    assert "running" in by_role["ours"]
    assert set(by_role) == {"published", "ours", "control", "oracle", "static"}
