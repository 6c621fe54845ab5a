import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.arithmetic import Accumulator
from torchlamp.policy.policy import SHOWS, SITES, Policy, SitePolicy
from torchlamp.rules import RULES, Rule

ACCUMULATORS = [
    "ps4",
    "ps23",
    "e4m3fn",
    "bf16",
    "ps7/unfused",
    "ps7/block32",
    "ps13/promote128",
    "e5m10/unfused",
]
SPELLINGS = [spelling for rule in RULES.values() for spelling in rule.examples]


def site_policies(site):
    """A policy with a rule that fits the site."""
    parsed = [Rule.parse(spelling) for spelling in SPELLINGS]
    fitting = [rule for rule in parsed if rule.looks_through in ("any", *SHOWS[site])]
    return st.builds(
        SitePolicy,
        st.sampled_from(ACCUMULATORS).map(Accumulator.parse),
        st.one_of(
            st.sampled_from(fitting),
            st.floats(0, 1e30, allow_nan=False).map(lambda t: Rule.parse(f"strict:{t!r}".replace("e+", "e"))),
        ),
    )


@given(st.fixed_dictionaries({}, optional={site: site_policies(site) for site in SITES}).filter(bool))
def test_round_trip(sites):
    policy = Policy(sites=sites)
    assert Policy.parse(str(policy)) == policy
    assert hash(Policy.parse(str(policy))) == hash(policy)
    assert policy.sites == sites
    assert list(policy.sites) == [site for site in SITES if site in sites]
    assert eval(repr(policy)) == policy


@pytest.mark.parametrize("rule", ["sink-recent:1,2", "random-like:sink-recent:1,2"])
def test_commas_of_a_rule_separate_no_sites(rule):
    both = Policy(sites={"scores": f"ps4+{rule}", "mlp_up": "ps7+running:0.1", "lm_head": "ps7+none"})
    assert str(both) == f"scores=ps4+{rule}, mlp_up=ps7+running:0.1, lm_head=ps7+none"
    for text in (
        str(both),
        str(both).replace(", ", ","),
        f"lm_head=ps7+none, mlp_up=ps7+running:0.1, scores=ps4+{rule}",
    ):
        assert Policy.parse(text) == both
    alone = Policy("ps4", rule)
    assert Policy.parse(str(alone)) == Policy.parse(f"scores=ps4+{rule}") == alone


def test_short_form_is_the_site_scores():
    policy = Policy(accumulate="ps4", rule="strict:0.1")
    assert str(policy) == "ps4+strict:0.1"
    assert policy == Policy.parse("scores=ps4+strict:0.1") == Policy.parse(" ps4 + strict:0.1 ")
    assert policy.sites["scores"] == SitePolicy(Accumulator.parse("ps4"), Rule.parse("strict:0.1"))
    assert Policy("ps7") == Policy.parse("ps7+none")
    assert Policy.parse(policy) is policy


def test_several_sites_in_the_order_of_the_forward_pass():
    text = "mlp_up=ps7+all,scores = ps4+strict:0.1"
    assert str(Policy.parse(text)) == "scores=ps4+strict:0.1, mlp_up=ps7+all"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ps4", "'ps4' needs an accumulator and a rule"),
        ("", "needs an accumulator and a rule"),
        ("+strict:0.1", "needs an accumulator and a rule"),
        ("ps4+", "needs an accumulator and a rule"),
        ("scores=", "site 'scores' in policy 'scores=' needs an accumulator and a rule"),
        ("scores=ps4+none, ", "unknown rule"),
        ("score=ps4+none", "unknown site 'score': the sites are scores, .*did you mean 'scores'"),
        ("mlp-up=ps4+none", "did you mean 'mlp_up'"),
        ("xyz=ps4+none", "unknown site 'xyz'"),
        ("=ps4+none", "unknown site ''"),
        ("scores=ps4+none, scores=ps5+none", "site 'scores' appears twice"),
        ("ps4+none, mlp_up=ps7+none", "'ps4\\+none' .* names no site"),
        ("ps99+none", "ps99"),
        ("ps4+stricct:0.1", "stricct"),
        ("ps4+condition:4", "rule 'condition:4' can't run at the site scores: .* it fits values, qkv"),
        ("norm=ps4+output:4", "rule 'output:4' can't run at the site norm"),
        ("mlp_up=ps4+mass:0.5", "rule 'mass:0.5' can't run at the site mlp_up: .* it fits scores, lm_head"),
        (
            "lm_head=ps4+random-like:condition:3",
            "rule 'random-like:condition:3' can't run at the site lm_head",
        ),
    ],
)
def test_bad_spellings(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        Policy.parse(text)
    assert "\n" not in str(caught.value)


def test_bad_arguments():
    with pytest.raises(TypeError, match="not int 4"):
        Policy.parse(4)
    with pytest.raises(TypeError, match="not int 4"):
        Policy(sites={"scores": 4})
    with pytest.raises(ValueError, match="accumulate"):
        Policy()
    with pytest.raises(ValueError, match="or sites"):
        Policy("ps4", sites={"scores": "ps4+none"})
    with pytest.raises(ValueError, match="beside sites"):
        Policy(rule="all", sites={"scores": "ps4+none"})
    with pytest.raises(TypeError, match=r"sites='ps4\+none' is no mapping"):
        Policy(sites="ps4+none")
    with pytest.raises(ValueError, match="at least one site"):
        Policy(sites={})
    with pytest.raises(ValueError, match="unknown site 'scoress'"):
        Policy(sites={"scoress": "ps4+none"})
