"""The figures' data against the points they come from; that they are drawn is tested with the report."""

import math

import pandas as pd
import pytest

from torchlamp.report.figures_data import (
    heads_data,
    layers_data,
    mu_data,
    positions_data,
    sites_data,
    transforms_data,
    typical_points,
    unrolled_heads,
)
from torchlamp.report.style import STYLES, numbered, order, rule_role, styles
from torchlamp.rules import RULES


def point(rule="strict", rate=0.01, accumulate="ps4", **changes):
    own = {
        "policy": f"{accumulate}+{rule}:{rate}", "rule": rule, "accumulate": accumulate, "mu": int(accumulate[2:]),
        "rate": rate, "realisable": True, "kl": 0.1, "kl_se": 0.01, "flip": 0.2, "flip_se": 0.01,
        "site": "scores", "layers": "all", "by_head": [[0.1, 0.2], [], [0.3, 0.4]], "by_position": [0.5, 0.25],
    }  # fmt: skip
    return own | changes


def test_typical_points_are_the_nearest_to_one_percent_of_each_realisable_rule():
    rows = [point(rate=r) for r in (0.001, 0.009, 0.03)] + [point("running", 0.2), point("none", 0.0)]
    rows += [point("oracle"), point("random-like strict")]
    rows += [point("strict", 0.01, "ps7")]
    found = typical_points(pd.DataFrame(rows))
    found = list(zip(found["accumulate"], found["rule"], found["rate"], strict=True))
    assert found == [("ps4", "strict", 0.009), ("ps7", "strict", 0.01), ("ps4", "running", 0.2)]
    assert len(typical_points(pd.DataFrame([point("none", 0.0)]))) == 0


def test_heads_and_positions_are_unrolled():
    points = pd.DataFrame([point(), point(rate=0.5, by_head=[[0.9]]), point(rate=0.011, accumulate="ps7")])
    assert list(heads_data(points)["typical"]) == [True, False, True]
    heads = unrolled_heads(heads_data(points))
    assert list(zip(heads["layer"], heads["head"], heads["rate"], strict=True)) == [
        (0, 0, 0.1), (0, 1, 0.2), (2, 0, 0.3), (2, 1, 0.4),
    ]  # fmt: skip
    assert list(positions_data(points)["position"]) == [8.0, 24.0] * 2


def test_mu_takes_the_ends_and_the_equal_rates():
    points = pd.DataFrame(
        [point("none", 0.0, "ps7"), point("none", 0.0), point("all", 1.0, kl=1e-12), point()]
    )
    at = pd.DataFrame(
        [
            {
                "accumulate": "ps4",
                "mu": 4,
                "rule": "strict",
                "rate": 0.01,
                "kl": 0.05,
                "kl_se": math.nan,
                "flip": 0.1,
                "flip_se": 0.01,
            }
        ]
    )
    found = mu_data(points, at)
    assert list(zip(found["rule"], found["mu"], found["rate"], strict=True)) == [
        ("strict", 4, 0.01), ("none", 4, 0.0), ("none", 7, 0.0), ("all", 4, 1.0),
    ]  # fmt: skip


def test_layers_and_sites_are_sorted():
    layers = layers_data(pd.DataFrame([point(layers="10"), point(layers="9")]))
    assert list(layers["layer"]) == [9, 10]
    assert list(layers["label"]) == ["scores=ps4+strict:0.01"] * 2
    sites = sites_data(
        pd.DataFrame([point(site="values"), point(site="qkv", kl=0.2), point(site="values", mu=2)])
    )
    assert list(zip(sites["site"], sites["mu"], strict=True)) == [("qkv", 4), ("values", 2), ("values", 4)]


def test_a_rule_has_one_look_and_controls_come_last():
    labels = ["oracle", "random-like strict", "my-rule", "strict"]
    assert styles(labels)["strict"] == STYLES["strict"] == styles(["strict"])["strict"]
    assert styles(labels)["random-like strict"] == STYLES["random-like"]
    assert sorted(labels, key=order) == ["strict", "my-rule", "random-like strict", "oracle"]


def test_no_two_rules_look_alike_and_controls_are_dashed():
    # A control that follows a rule is never named without it.
    labels = [
        *(name for name in RULES if name != "random-like"),
        "random-like strict",
        "random-like running",
        "strict / none",
        "strict / running",
    ]
    labels += [f"someone's-{number}" for number in range(12)]
    found = styles(labels)
    assert len({(s.light, s.symbol, s.dash) for s in found.values()}) == len(labels)
    assert len({(s.light, s.marker, str(s.line)) for s in found.values()}) == len(labels)
    for label in found.keys() - {"none", "all"}:
        style, role = found[label], rule_role(label)
        assert (style.dash == "dash") == (role == "control"), label
        assert (style.dash == "dot") == (role == "oracle"), label
    assert len({(s.symbol, s.dash) for s in (numbered(STYLES["strict"], i) for i in range(20))}) == 20


def test_positions_are_compared_at_one_rate():
    """Two rules of other rates, both proportional to position: interpolated to one rate, they are equal."""
    rows = [
        point(rule, rate, by_position=[rate * 1.5, rate * 0.5])
        for rule, rates in (("strict", (0.004, 0.012)), ("running", (0.006, 0.018)), ("mass", (0.3,)))
        for rate in rates
    ]
    table = positions_data(pd.DataFrame(rows))
    assert set(table["rule"]) == {"strict", "running"}
    assert set(table["at"]) == {0.01}
    assert list(table["rate"]) == pytest.approx([0.015, 0.005] * 2)
    alone = positions_data(pd.DataFrame(rows[:1] + rows[-1:]))
    assert list(alone.drop_duplicates("rule")["at"]) == [0.004, 0.3]
    assert list(alone["policy"].unique()) == ["ps4+strict:0.004", "ps4+mass:0.3"]


def test_transforms_are_compared_at_one_accumulator():
    def of(transform, rule, rate, kl):
        spelling = "ps4" if transform == "none" else f"ps4.{transform}"
        own = point(rule, rate, kl=kl) | {"accumulate": spelling, "policy": f"{spelling}+{rule}"}
        return own | {"untransformed": "ps4", "transform": transform}

    rows = [of("none", "none", 0, 0.4), of("center", "none", 0, 0.04), of("center", "strict", 0.02, 0.001)]
    rows += [of("center", "strict", 0.3, 1e-5), of("center", "random", 0.03, 0.03)]
    rows += [of("none", "strict", 0.03, 0.1) | {"accumulate": "ps7", "untransformed": "ps7"}]
    table = transforms_data(pd.DataFrame(rows))
    assert list(table["transform"]) == ["none", "center", "center"]
    assert list(table["rate"]) == [0, 0, 0.02]
    assert list(table["times"]) == pytest.approx([1, 10, 400])
    assert len(transforms_data(pd.DataFrame(rows[:1]))) == 0


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("rule", sorted(set(RULES) | {"someone-elses"}))
def test_every_rule_is_visible_on_both_papers(rule):
    style = styles([rule])[rule]
    on_white = 1.05 / (_luminance(style.light) + 0.05)
    on_dark = (_luminance(style.dark) + 0.05) / (_luminance("#16181b") + 0.05)
    assert on_white >= 3
    assert on_dark >= 4.5
