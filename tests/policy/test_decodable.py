import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.policy.decodable import Settings, kernels, nearest, settings, threshold
from torchlamp.policy.policy import Policy
from torchlamp.rules import Rule


def test_what_kernels_are_told():
    told = settings(
        Policy.parse(
            "scores=int4.center+running:0.25, values=int8+all, mlp_up=int8, mlp_down=int4, lm_head=int12"
        )
    )
    assert told == {
        "scores": Settings(4, 0.25, center=True),
        "values": Settings(8, -1.0),
        "mlp_up": Settings(8, math.inf),
        "mlp_down": Settings(4, math.inf),
        "lm_head": Settings(12, math.inf),
    }
    both = settings(Policy.parse("scores=int8.hadamard.center, values=int4"))["scores"]
    assert both == Settings(8, math.inf, center=True, hadamard=True)


@given(st.floats(0, 1e30))
def test_every_threshold_survives_its_spelling(number):
    policy = Policy.parse(f"lm_head=int8+running:{number!r}".replace("e+", "e"))
    assert settings(policy)["lm_head"].threshold == number
    assert Policy.parse(str(policy)) == policy


def test_thresholds_of_the_two_ends():
    assert threshold(Rule.parse("none")) == math.inf
    assert threshold(Rule.parse("all")) == -1.0


@pytest.mark.parametrize(
    ("text", "said", "runs"),
    [
        (
            "scores=mxfp4+running:0.1, values=int8",
            "operand 'mxfp4' at site scores",
            "scores=int4+running:0.1, values=int8",
        ),
        ("qkv=int5", "operand 'int5' at site qkv", "qkv=int8"),
        ("qkv=int8/row", "operand 'int8/row' at site qkv", "qkv=int8"),
        ("qkv=int16", "operand 'int16' at site qkv", "qkv=int12"),
        ("scores=int12, values=int8", "operand 'int12' at site scores", "scores=int8, values=int8"),
        (
            "qkv=int8, attention_out=ps4",
            "accumulator 'ps4' at site attention_out",
            "qkv=int8, attention_out=int8",
        ),
        ("lm_head=int4@ps4", "precision 'int4@ps4' at site lm_head", "lm_head=int4"),
        ("lm_head=int8+strict:0.1", "rule 'strict:0.1' at site lm_head", "lm_head=int8+running:1e-05"),
        (
            "mlp_up=int8+output-cheap:1, mlp_down=int8",
            "rule 'output-cheap:1' at site mlp_up",
            "mlp_up=int8+output:0.0006, mlp_down=int8",
        ),
        ("qkv=int8+all", "rule 'all' at site qkv", "qkv=int8"),
        ("qkv=int8.hadamard", "transform 'hadamard' at site qkv", "qkv=int8"),
        (
            "int8.sort.center, values=int8",
            "transform 'sort' at site scores",
            "scores=int8.center, values=int8",
        ),
        ("qkv=int8, norm=ps4", "site norm ('norm=ps4+none')", "qkv=int8"),
        (
            "int8+running:0.1",
            "sites scores and values are decoded by one kernel: name both, or neither",
            "scores=int8+running:0.1, values=int8+topz:0.003",
        ),
        (
            "mlp_down=int4",
            "sites mlp_up and mlp_down are decoded by one kernel",
            "mlp_up=int4+output:0.0006, mlp_down=int4",
        ),
    ],
)
def test_what_no_kernel_runs_is_named_with_the_nearest_that_runs(text, said, runs):
    with pytest.raises(ValueError) as error:
        settings(Policy.parse(text))
    message = str(error.value)
    assert said in message
    assert "\n" not in message
    assert message.endswith(f"the nearest policy that runs is '{runs}'")
    assert settings(Policy.parse(runs))


def test_a_policy_of_no_site_with_a_kernel():
    with pytest.raises(
        ValueError, match=r"site norm .* has no decoding kernel; sites with kernels are scores"
    ):
        settings(Policy.parse("norm=ps4"))
    assert nearest(Policy.parse("norm=ps4")) is None


@pytest.mark.parametrize("site", list(kernels()))
@pytest.mark.parametrize(
    "spelling", ["ps4", "ps23/block32", "int2", "int8.center", "nvfp4", "mxfp8@fp32", "bf16/row"]
)
@pytest.mark.parametrize("rule", ["none", "all", "running:0.1", "random:0.1"])
def test_the_nearest_policy_runs(site, spelling, rule):
    if site == "values" and "." in spelling:
        spelling = spelling.partition(".")[0]
    found = nearest(Policy.parse(f"{site}={spelling}+{rule}"))
    assert settings(found)
    assert nearest(found) == found


def test_the_page_has_the_table_of_the_kernels():
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
    rows = []
    for site, kernel in kernels().items():
        rules = ["none"] if kernel.rule is None else ["none", f"{kernel.rule.name}:T", "all"]
        cells = ([site], [f"int{bits}" for bits in kernel.bits], kernel.transforms, rules)
        rows.append(
            "|"
            + "|".join(f" {' '.join(f'`{name}`' for name in cell)} ".replace("  ", " ") for cell in cells)
            + "|"
        )
    assert "\n".join(rows) in page
