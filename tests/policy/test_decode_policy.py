import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.policy.decode_policy import FORMATS, DecodePolicy, SiteStorage

EXAMPLES = [
    "qkv=int12",
    "scores=int8+running:0.01, values=int4+topz:0.01",
    "scores=int4+all, values=int8",
    "qkv=int4, attention_out=int8",
    "mlp_up=int12+output:0.001, mlp_down=int8+output:0",
    "mlp_up=int12+all, mlp_down=int12",
    "lm_head=int8+running:1e-05",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_text_and_policy_are_the_same(text):
    policy = DecodePolicy.parse(text)
    assert str(policy) == text
    assert DecodePolicy.parse(str(policy)) == policy
    assert DecodePolicy.parse(policy) is policy
    assert eval(repr(policy)) == policy
    assert DecodePolicy(policy.sites) == policy
    assert hash(DecodePolicy(policy.sites)) == hash(policy)


@given(st.floats(0, 1e30))
def test_every_threshold_survives_its_spelling(threshold):
    policy = DecodePolicy.parse(f"lm_head=int8+running:{threshold!r}")
    assert policy.sites["lm_head"].threshold == threshold
    assert DecodePolicy.parse(str(policy)) == policy


def test_spaces_order_and_the_rule_none_do_not_matter():
    plain = DecodePolicy.parse("qkv=int8, lm_head=int8+running:0.5")
    assert DecodePolicy.parse(" lm_head = int8 + running : 5e-1 ,qkv=int8+none") == plain
    assert str(plain) == "qkv=int8, lm_head=int8+running:0.5"


def test_bits_and_thresholds():
    sites = DecodePolicy.parse("scores=int4+running:0.25, values=int8+all, lm_head=int12").sites
    assert {site: storage.bits for site, storage in sites.items()} == {
        "scores": 4,
        "values": 8,
        "lm_head": 12,
    }
    assert [storage.threshold for storage in sites.values()] == [0.25, -1.0, float("inf")]
    assert FORMATS == {"int4": 4, "int8": 8, "int12": 12}


def test_less_of_a_policy():
    policy = DecodePolicy.parse(EXAMPLES[1] + ", lm_head=int8+running:0.1")
    assert str(policy.without("scores", "values")) == "lm_head=int8+running:0.1"
    assert str(policy.unguarded()) == "scores=int8, values=int4, lm_head=int8"
    with pytest.raises(ValueError, match="name both, or neither"):
        policy.without("scores")
    with pytest.raises(ValueError, match="needs at least one site"):
        policy.without("scores", "values", "lm_head")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("score=int8, values=int8", "unknown site 'score' of decoding: did you mean 'scores'? allowed are scores"),
        ("norm=int8", "unknown site 'norm' of decoding: "),
        ("qkv", "'qkv' in policy 'qkv' names no site or no format: write site=format+rule, for example"),
        ("qkv=", "'qkv=' in policy 'qkv=' names no site or no format"),
        ("", "'' in policy '' names no site or no format"),
        ("qkv=int8,", "'' in policy 'qkv=int8,' names no site or no format"),
        ("qkv=int8, qkv=int4", "site 'qkv' is named twice in policy 'qkv=int8, qkv=int4'"),
        ("qkv=int5", "format 'int5' at site qkv: allowed are int4, int8, int12"),
        ("qkv=ps4+none", "format 'ps4' at site qkv: allowed are int4, int8, int12"),
        ("scores=int12, values=int8", "format 'int12' at site scores: allowed are int4, int8"),
        ("qkv=int8+all", "rule 'all' at site qkv: its copy is read as it is; leave the site out instead"),
        ("qkv=int8+running:1", "rule 'running' at site qkv of decoding: allowed are none"),
        ("qkv=int8+", "rule '' at site qkv of decoding: allowed are none"),
        ("lm_head=int8+strict:1", "rule 'strict' at site lm_head of decoding: allowed are none, running:T, all"),
        ("lm_head=int8+all:1", "rule 'all' at site lm_head of decoding: allowed are none, running:T, all"),
        ("lm_head=int8+running", "threshold '' of rule running at site lm_head: give a number from 0"),
        ("lm_head=int8+running:x", "threshold 'x' of rule running at site lm_head: give a number from 0"),
        ("lm_head=int8+running:-1", "threshold '-1' of rule running"),
        ("lm_head=int8+running:nan", "threshold 'nan' of rule running"),
        ("lm_head=int8+running:inf", "threshold 'inf' of rule running"),
        ("scores=int8", "sites scores and values are decoded by one kernel: name both, or neither"),
        ("mlp_down=int8", "sites mlp_up and mlp_down are decoded by one kernel: name both, or neither"),
    ],
)  # fmt: skip
def test_what_is_refused_and_why(text, said):
    with pytest.raises(ValueError) as error:
        DecodePolicy.parse(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_storage_given_as_an_object_is_checked_too():
    with pytest.raises(ValueError, match="format 'int12' at site scores"):
        DecodePolicy({"scores": SiteStorage("int12"), "values": SiteStorage("int8")})
    with pytest.raises(ValueError, match="format 'fp8' at site qkv"):
        DecodePolicy({"qkv": SiteStorage("fp8")})


@pytest.mark.parametrize("given", [None, 8, {"qkv": "int8"}])
def test_only_strings_are_parsed(given):
    with pytest.raises(TypeError, match=f"a decoding policy is a string, not {type(given).__name__}"):
        DecodePolicy.parse(given)


@pytest.mark.parametrize(
    ("text", "decoding"),
    [
        ("qkv=int12", True),
        ("scores=int8+running:0.01, values=int8", True),
        ("ps4+strict:0.1", False),
        ("scores=ps4+running:0.03, mlp_up=ps5+running:0.009", False),
    ],
)
def test_spellings_of_decoding_and_of_simulation_are_told_apart(text, decoding):
    assert DecodePolicy.looks_like(text) == decoding
