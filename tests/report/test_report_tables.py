"""Interpolation at equal rates, its errors, and the table of points."""

import math

import numpy as np
import pandas as pd
import pytest

from torchlamp.report.tables import RATES, at_rates, equal_rate, rates_of, summary

BASE = {
    "model": "m", "text": "t", "tokens": "real", "site": "scores", "layers": "all", "accumulate": "ps4", "mu": 4,
    "realisable": True,
}  # fmt: skip


def curve(rule, values, rates=(0.004, 0.016, 0.064), **changes):
    """Points whose windows' KL are given, one list a point."""
    points = []
    for rate, windows in zip(rates, values, strict=True):
        own = {f"{metric}_by_window": list(windows) for metric in ("kl", "flip")}
        own |= {metric: float(np.mean(windows)) for metric in ("kl", "flip")}
        points.append(BASE | {"rule": rule, "rate": rate} | own | changes)
    return points


def test_a_power_law_is_met_exactly():
    rates = [0.01, 0.02, 0.08]
    found = at_rates(rates, [3 * r**-1.5 for r in rates], [0.01, 0.015, 0.05, 0.08])
    assert found == pytest.approx([3 * r**-1.5 for r in (0.01, 0.015, 0.05, 0.08)])


def test_nothing_is_extrapolated_and_zeros_are_left_out():
    found = at_rates([0.01, 0.02, 0.04], [1.0, 0.0, 2.0], [0.005, 0.02, 0.05])
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(math.sqrt(2))
    assert math.isnan(found[2])
    assert np.isnan(at_rates([0.0, math.nan], [1.0, 1.0], [0.01])).all()


def test_nothing_is_read_off_between_points_far_apart():
    found = at_rates([0.01, 0.05, 0.1], [1.0, 0.1, 0.01], [0.01, 0.02, 0.05, 0.07])
    assert np.isfinite(found).tolist() == [True, False, True, True]


def test_points_at_one_rate_count_as_their_mean():
    assert at_rates([0.01, 0.01], [1.0, 4.0], [0.01]) == pytest.approx([2.0])


def test_ratio_and_paired_error_equal_the_jackknife_done_by_hand():
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 3, 4)
    ours = [hard * c * rng.uniform(0.9, 1.1, 4) for c in (1.0, 0.1, 0.01)]
    theirs = [hard * c * rng.uniform(0.9, 1.1, 4) for c in (2.0, 0.2, 0.02)]
    table = equal_rate(pd.DataFrame(curve("ours", ours) + curve("strict", theirs)))
    row = table[(table["rule"] == "ours") & (table["rate"] == 0.04)].iloc[0]

    def value(values, windows):
        ys = [math.log(np.mean(v[windows])) for v in values[1:]]
        part = math.log(0.04 / 0.016) / math.log(4)
        return math.exp(ys[0] * (1 - part) + ys[1] * part)

    everything = [0, 1, 2, 3]
    ratios = []
    for w in everything:
        rest = [x for x in everything if x != w]
        ratios.append(value(ours, rest) / value(theirs, rest))
    assert row["kl_ratio"] == pytest.approx(value(ours, everything) / value(theirs, everything))
    assert row["kl_ratio_se"] == pytest.approx(
        math.sqrt(3 / 4 * sum((r - np.mean(ratios)) ** 2 for r in ratios))
    )
    # Windows that are hard for both cancel in the ratio.
    assert row["kl_ratio_se"] / row["kl_ratio"] < 0.5 * row["kl_se"] / row["kl"]


def test_strict_is_one_without_error_and_what_is_missing_is_missing():
    table = equal_rate(
        pd.DataFrame(curve("strict", [[2.0], [1.0], [0.5]]) + curve("short", [[1.0]], rates=[0.01]))
    )
    strict = table[table["rule"] == "strict"]
    assert list(strict["rate"]) == list(RATES)
    assert (strict["kl_ratio"] == 1).all()
    assert strict["kl_ratio_se"].isna().all()  # one window has no jackknife
    assert list(table[table["rule"] == "short"]["rate"]) == [0.01]


def test_rates_are_those_of_the_data():
    points = pd.DataFrame(curve("strict", [[2.0], [1.0], [0.5]], rates=[0.09, 0.18, 0.35]))
    assert rates_of(points) == (0.1, 0.15, 0.2, 0.3)
    assert list(equal_rate(points)["rate"]) == [0.1, 0.15, 0.2, 0.3]
    assert rates_of(points[:0]) == ()


def test_without_the_published_rule_there_is_no_ratio():
    table = equal_rate(pd.DataFrame(curve("other", [[2.0, 1.0], [1.0, 1.0], [0.5, 1.0]])))
    assert table["kl_ratio"].isna().all()
    assert table["kl"].notna().all()


def test_no_curve_at_all():
    table = equal_rate(pd.DataFrame(curve("none", [[1.0]], rates=[0.0])))
    assert len(table) == 0
    assert {"kl_ratio", "flip_ratio_se"} <= set(table.columns)


def test_summary_follows_llama_cpp():
    point = BASE | {
        "policy": "ps4+none", "rule": "none", "perplexity": 11.0, "reference_perplexity": 10.0, "log_ratio_se": 0.01,
        "kl": 0.1, "kl_se": 0.02, "kl_99": 0.9, "rms_delta_p": 0.05, "flip": 0.25, "flip_se": 0.01, "rate": 0.0,
        "rows_touched": 0.0,
    }  # fmt: skip
    row = summary(pd.DataFrame([point])).iloc[0]
    assert row["delta_PPL"] == 1.0
    assert row["delta_PPL_se"] == pytest.approx(0.11)
    assert row["same_top"] == 0.75
    columns = list(summary(pd.DataFrame([point])).columns)
    order = ["PPL", "delta_PPL", "KLD", "KLD_99", "rms_delta_p", "same_top", "recompute_rate"]
    assert [c for c in columns if c in order] == order
