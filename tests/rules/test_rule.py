import math
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.rules import RULES, Mass, NumberRule, Random, RandomLike, Rule, Strict

NUMBER_RULES = [rule for rule in RULES.values() if issubclass(rule, NumberRule)]


@st.composite
def rules(draw):
    kind = draw(st.sampled_from(list(RULES.values())))
    if issubclass(kind, NumberRule):
        lowest, highest = kind.allowed
        return kind(draw(st.floats(lowest, min(highest, sys.float_info.max))))
    if kind is RandomLike:
        return RandomLike(draw(rules().filter(lambda rule: not isinstance(rule, RandomLike))))
    if len(fields(kind)) == 0:
        return kind()
    return Rule.parse(draw(st.sampled_from(kind.examples)))


@given(rules())
def test_parse_and_print_round_trip(rule):
    assert Rule.parse(str(rule)) == rule
    assert str(Rule.parse(str(rule))) == str(rule)
    assert Rule.parse(f" {rule}\n") == rule
    assert "+" not in str(rule)


@pytest.mark.parametrize(
    ("spelling", "printed"),
    [
        ("strict:0.1", "strict:0.1"),
        ("strict:.10", "strict:0.1"),
        ("strict:50", "strict:50"),
        ("strict:50.0", "strict:50"),
        ("strict:+5e1", "strict:50"),
        ("strict:0.00001", "strict:1e-05"),
        ("strict:1e22", "strict:1e22"),
        ("strict:-0", "strict:0"),
        ("strict: 2", "strict:2"),
        ("relaxed-length:0.03", "relaxed-length:0.03"),
        ("random-like:mass:0.90", "random-like:mass:0.9"),
        ("random-like:none", "random-like:none"),
    ],
)
def test_spellings(spelling, printed):
    assert str(Rule.parse(spelling)) == printed


def test_numbers_given_in_python_print_alike():
    assert str(Strict(50)) == str(Strict(50.0)) == "strict:50"
    assert Strict(50) == Strict(50.0)
    assert str(Strict(-0.0)) == "strict:0"


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        (
            "strikt:0.1",
            r"unknown rule 'strikt': did you mean 'strict'\? the rules are none, all, strict, relaxed,",
        ),
        ("Strict:0.1", r"unknown rule 'Strict': did you mean 'strict'\?"),
        ("relaxed_length:1", r"did you mean 'relaxed-length'\?"),
        ("", r"unknown rule '': the rules are none, all"),
        ("qqq", r"unknown rule 'qqq': the rules are none, all"),
        (":0.1", r"unknown rule ''"),
        ("none:1", r"rule 'none:1': none takes no parameter; write 'none'"),
        ("all:", r"rule 'all:': all takes no parameter; write 'all'"),
        ("strict", r"rule 'strict' lacks its number: strict takes a finite number >= 0; .*'strict:0\.1'"),
        ("strict:", r"rule 'strict' lacks its number"),
        ("strict:-1", r"rule 'strict:-1': strict takes a finite number >= 0"),
        ("strict:x", r"rule 'strict:x': strict takes a finite number"),
        ("strict:nan", r"rule 'strict:nan'"),
        ("strict:inf", r"rule 'strict:inf'"),
        ("strict:1e999", r"rule 'strict:1e999'"),
        ("strict:1_0", r"rule 'strict:1_0'"),
        ("strict:\N{ARABIC-INDIC DIGIT THREE}", r"strict takes a finite number"),
        ("STRICT :0.1", r"unknown rule 'STRICT ': did you mean 'strict'\?"),
        ("strict:0.1:0.2", r"rule 'strict:0\.1:0\.2'"),
        ("relaxed:1.5", r"rule 'relaxed:1\.5': relaxed takes a finite number in \[0, 1\]"),
        ("mass:-0.1", r"rule 'mass:-0\.1': mass takes a finite number in \[0, 1\]"),
        ("random:2", r"rule 'random:2': random takes a finite number in \[0, 1\]"),
        ("topz:1.01", r"rule 'topz:1\.01'"),
        ("running:-1e-9", r"rule 'running:-1e-9': running takes a finite number >= 0"),
        ("random-like", r"rule 'random-like' lacks its rule; write for example 'random-like:strict:0\.1'"),
        ("random-like:", r"rule 'random-like' lacks its rule"),
        ("random-like:strict", r"rule 'strict' lacks its number"),
        ("random-like:strikt:1", r"unknown rule 'strikt'"),
        ("random-like:random-like:none", r"random-like can't imitate random-like; write 'random-like:none'"),
    ],
)
def test_bad_spellings_get_one_clear_line(spelling, message):
    with pytest.raises(ValueError, match=message) as caught:
        Rule.parse(spelling)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [None, 3, 0.1, b"none", ["none"]])
def test_only_strings_and_rules_parse(given):
    with pytest.raises(TypeError, match=r"expected a string such as 'strict:0\.1' or a Rule"):
        Rule.parse(given)


@pytest.mark.parametrize("kind", NUMBER_RULES)
@pytest.mark.parametrize("given", [math.nan, math.inf, -math.inf, -1, -1e-300, 10**400])
def test_numbers_out_of_range(kind, given):
    with pytest.raises(ValueError, match=f"rule '{kind.name}:"):
        kind(given)


@pytest.mark.parametrize("given", ["0.1", None, True, 1j])
def test_parameters_must_be_numbers(given):
    with pytest.raises(TypeError, match=f"must be a number, got {given!r}"):
        Strict(given)


def test_random_like_takes_a_rule():
    with pytest.raises(TypeError, match="expected a Rule to imitate, got 'none'"):
        RandomLike("none")


@pytest.mark.parametrize("kind", [rule for rule in RULES.values() if rule is not RandomLike])
def test_random_like_is_given_all_that_the_imitated_rule_reads(kind):
    rule = Rule.parse(kind.examples[0])
    for name in ("looks_through", "byproducts", "reads_residual_stream"):
        assert getattr(RandomLike(rule), name) == getattr(rule, name), name


def test_needs_follow_the_imitated_rule():
    assert Rule.parse("random-like:running:1").byproducts == {"squares"}
    assert Rule.parse("random-like:strict:1").byproducts == frozenset()
    assert Rule.parse("random-like:none").needs_generator
    assert not Mass(0.5).needs_generator
    assert Random(0.5).needs_generator
