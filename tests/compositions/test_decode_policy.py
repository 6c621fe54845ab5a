import pytest

from torchlamp.compositions.decode_policy import DecodePolicy, SiteStorage
from torchlamp.integrations.decoding import DEFAULT, FAST


@pytest.mark.parametrize("text", [DEFAULT, FAST, "qkv=int4", "scores=int8+all, values=int4+all"])
def test_round_trip(text):
    policy = DecodePolicy.parse(text)
    assert DecodePolicy.parse(str(policy)) == policy
    assert DecodePolicy.parse(policy) is policy
    assert DecodePolicy.looks_like(text)


def test_thresholds():
    sites = DecodePolicy.parse("scores=int8+all, values=int4+topz:0.25, lm_head=int12").sites
    assert sites["scores"].threshold < 0
    assert sites["values"] == SiteStorage("int4", "topz", 0.25)
    assert sites["lm_head"].threshold == float("inf")
    assert [sites[name].bits for name in sites] == [8, 4, 12]


def test_without_and_unguarded():
    policy = DecodePolicy.parse("scores=int8+running:0.1, values=int8+topz:0.1, qkv=int12")
    assert str(policy.without("scores", "values")) == "qkv=int12"
    assert str(policy.unguarded()) == "scores=int8, values=int8, qkv=int12"


def test_simulation_is_not_decoding():
    assert not DecodePolicy.looks_like("ps4+strict:0.1")
    assert not DecodePolicy.looks_like("scores=ps4+running:0.03, mlp_up=ps5+none")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scores=int8+running:0.1", "name both, or neither"),
        ("mlp_up=int8, scores=int8, values=int8", "name both, or neither"),
        ("qvk=int8", "did you mean 'qkv'?"),
        ("norm=int8", "unknown site 'norm'"),
        ("qkv=int9", "'int9'"),
        ("scores=int12, values=int8", "'int12'"),
        ("qkv=int8+running:1", "rule 'running' at site qkv"),
        ("qkv=int8+all", "leave the site out"),
        ("lm_head=int8+strict:1", "rule 'strict'"),
        ("lm_head=int8+running:x", "threshold 'x'"),
        ("lm_head=int8+running:-1", "threshold '-1'"),
        ("lm_head=int8+running", "threshold ''"),
        ("qkv=int8, qkv=int4", "named twice"),
        ("int8", "names no site"),
        ("qkv=", "no format"),
    ],
)
def test_refuses(text, said):
    with pytest.raises(ValueError, match=r"(?s).*") as error:
        DecodePolicy.parse(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_other_types():
    with pytest.raises(TypeError, match="not int"):
        DecodePolicy.parse(8)
    with pytest.raises(ValueError, match="at least one site"):
        DecodePolicy({})
