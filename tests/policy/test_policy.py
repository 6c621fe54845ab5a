import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.transforms import TRANSFORMS
from torchlamp.policy.fit import shows
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.policy.precision import Precision
from torchlamp.policy.sites import SITES
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
OPERANDS = ["float32", "int4", "int8/row", "int12", "bf16", "e4m3fn/row", "mxfp8", "mxfp4", "nvfp4"]
SPELLINGS = [spelling for rule in RULES.values() for spelling in rule.examples]


def precisions(site):
    """Operands, accumulators and transforms that fit the site."""
    operands = st.just("float32") if site == "norm" else st.sampled_from(OPERANDS)
    transforms = (
        st.just(())
        if site in ("values", "norm")
        else st.lists(st.sampled_from([*TRANSFORMS.values()]), unique=True)
    )
    sums = st.sampled_from(ACCUMULATORS).map(Accumulator.parse)
    both = st.builds(Precision, operands.map(Operand.parse), sums, transforms.map(tuple))
    # A float format alone is an accumulator.
    stored = operands.filter(lambda name: name != "bf16").map(Operand.parse)
    return both | st.builds(Precision, stored, st.none(), transforms.map(tuple))


@st.composite
def site_policies(draw, site):
    """A policy with a rule that fits the site."""
    precision = draw(precisions(site))
    seen = shows(site, precision.is_stored)
    fitting = [rule for rule in map(Rule.parse, SPELLINGS) if rule.looks_through in seen]
    numbers = st.floats(0, 1e30, allow_nan=False).map(
        lambda t: Rule.parse(f"running:{t!r}".replace("e+", "e"))
    )
    return SitePolicy(precision, draw(st.sampled_from(fitting) | numbers))


@given(st.fixed_dictionaries({}, optional={site: site_policies(site) for site in SITES}).filter(bool))
def test_round_trip(sites):
    policy = Policy(sites=sites)
    assert Policy.parse(str(policy)) == policy
    assert hash(Policy.parse(str(policy))) == hash(policy)
    assert policy.sites == sites
    assert list(policy.sites) == [site for site in SITES if site in sites]
    assert eval(repr(policy)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy


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
    assert Policy("ps7") == Policy.parse("ps7+none") == Policy.parse("ps7")
    assert Policy.parse(policy) is policy


def test_several_sites_in_the_order_of_the_forward_pass():
    text = "mlp_up=ps7+all,scores = ps4+strict:0.1"
    assert str(Policy.parse(text)) == "scores=ps4+strict:0.1, mlp_up=ps7+all"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "policy '' needs an accumulator or an operand"),
        ("+strict:0.1", "lacks the accumulator or operand"),
        ("ps4+", "lacks the rule behind its '\\+'"),
        ("scores=", "site 'scores' in policy 'scores=' needs an accumulator or an operand"),
        ("scores=ps4+none, ", "unknown rule"),
        ("qkv=int8,", "'int8,' is neither"),
        ("score=ps4+none", "unknown site 'score': the sites are scores, .*did you mean 'scores'"),
        ("mlp-up=ps4+none", "did you mean 'mlp_up'"),
        ("xyz=ps4+none", "unknown site 'xyz'"),
        ("=ps4+none", "unknown site ''"),
        ("scores=ps4+none, scores=ps5+none", "site 'scores' appears twice"),
        ("ps4+none, scores=ps7+none", "site 'scores' appears twice"),
        ("mxpf4+none", "'mxpf4' is neither an accumulator nor an operand: did you mean 'mxfp4'\\?"),
        ("int9x", "'int9x' is neither .*: did you mean 'int"),
        ("hoper-fp8@ps4", "'hoper-fp8' in 'hoper-fp8@ps4' is no operand, which stands before '@'"),
        ("int8@ps44", "'ps44' in 'int8@ps44' is no accumulator, which stands behind '@': did you mean 'ps4'"),
        ("int8@", "'int8@' lacks an accumulator or operand"),
        ("@ps4", "'@ps4' lacks an accumulator or operand"),
        ("ps4/blok3", "can't use option 'blok3' in accumulator 'ps4/blok3'"),
        ("ps4.centre", "unknown transform 'centre' in 'ps4.centre': did you mean 'center'"),
        ("ps4.", "unknown transform '' in 'ps4.'"),
        ("ps4.sort.sort", "transform 'sort' is named twice"),
        ("values=ps4.smooth", "transform 'smooth' can't be used at the site values; it fits scores, qkv"),
        (
            "values=int8.center",
            "transform 'center' can't be used at the site values with a stored operand; it fits",
        ),
        ("norm=ps4.sort", "transform 'sort' can't be used at the site norm"),
        ("norm=int8", "operand 'int8' can't be used at the site norm, .* it fits scores, values"),
        ("values=ps4+topz:0.1", "rule 'topz:0.1' can't run at the site values: .* it fits scores, lm_head"),
        ("values=int8+output:0.1", "at the site values with the stored operand int8: .* it fits qkv"),
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


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("ps4", "ps4+none"),
        ("int8/32", "int8"),
        ("INT8 . Hadamard.center + running:1e-3", "int8.center.hadamard+running:0.001"),
        ("float32", "fp32+none"),
        ("float32@ps4.sort", "ps4.sort+none"),
        ("bf16", "bf16+none"),
        ("bf16@fp32", "bf16@fp32+none"),
        ("e4m3fn/row", "e4m3fn/row"),
        ("ps4/block32.center.sort+strict:0.1", "ps4/block32.center.sort+strict:0.1"),
        ("mlp_up=nvfp4@ps13/promote128+output:0.01", "mlp_up=nvfp4@ps13/promote128+output:0.01"),
        ("ps4+heads:0.1/3.0", "ps4+heads:0.1/3.0"),
        ("ps4, qkv=e4m3fn-sat", "scores=ps4+none, qkv=e4m3fn-sat+none"),
        ("values=int8+topz:0.003, scores=int8", "scores=int8, values=int8+topz:0.003"),
    ],
)
def test_the_canonical_spelling(text, printed):
    assert str(Policy.parse(text)) == printed
    assert Policy.parse(printed) == Policy.parse(text)


def test_what_a_name_alone_stands_for():
    for text, operand, accumulator in (
        ("ps4", "float32", "ps4"),
        ("bf16", "float32", "bf16"),
        ("e4m3fn", "float32", "e4m3fn"),
        ("int12", "int12", None),
        ("mxfp4", "mxfp4", None),
        ("mxfp4@ps10", "mxfp4", "ps10"),
    ):
        precision = Precision.parse(text)
        assert str(precision.operand) == operand
        assert precision.is_stored == (accumulator is None)
        assert accumulator is None or str(precision.accumulator) == accumulator
        assert str(precision.sums) == (accumulator or "fp32")
    assert Precision.parse(Operand.parse("int8")) == Precision.parse("int8")
    assert Precision.parse(Accumulator.parse("ps4")) == Precision.parse("ps4")
    assert SitePolicy.parse("int8+running:1").accumulate == Accumulator.parse("fp32")
    with pytest.raises(TypeError, match="not int 4"):
        Precision.parse(4)


def test_less_of_a_policy():
    policy = Policy.parse("scores=int8.center+running:0.1, values=int4+topz:0.1, lm_head=int8+running:0.1")
    assert str(policy.without("scores", "values")) == "lm_head=int8+running:0.1"
    assert str(policy.unguarded()) == "scores=int8.center, values=int4, lm_head=int8"
    assert policy.has_stored
    assert not Policy.parse("ps4, qkv=int8@ps4").has_stored
    with pytest.raises(ValueError, match="needs at least one site"):
        policy.without("scores", "values", "lm_head")


def test_a_float_format_alone_is_no_stored_operand():
    with pytest.raises(ValueError, match="'bf16' alone is the name of an accumulator: write 'bf16@fp32'"):
        Precision(Operand.parse("bf16"))
    assert Precision.parse("bf16").operand.is_float32
    assert Precision.parse("bf16/row").is_stored
