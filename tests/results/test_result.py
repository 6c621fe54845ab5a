import dataclasses
import json
import math

import pytest

from torchlamp.report.table import label, notes, print_result
from torchlamp.results.result import REFERENCE_POLICY, Result

DESIGN_KEYS = {
    *(
        "model",
        "text",
        "windows",
        "window_length",
        "policy",
        "kl_mean",
        "kl_standard_error",
        "kl_percentiles",
    ),
    *("flip_rate", "perplexity", "reference_perplexity", "recompute_rate", "recompute_rate_by_layer"),
    *("rows_touched", "seconds", "environment"),
}


def make(role="tested", **changes) -> Result:
    values = {f.name: 0.25 for f in dataclasses.fields(Result)} | {
        "model": "m", "text": "t", "windows": 2, "window_length": 8, "policy": "ps4+strict:0.1", "seed": 0,
        "partial": False, "tokens_sha256": "00", "role": role, "environment": {"threads": 2, "kernels": "native"},
        "kl_percentiles": {"50": 0.1, "max": 1.0}, "recompute_rate_by_layer": [0.5, 0.25], "comparisons": (),
        "recompute_rate_by_site": {"scores": 0.25}, "recompute_rate_by_head": [[0.5, 0.5], [0.25, 0.25]],
        "recompute_rate_by_position": [0.25], "block_rates": {"entry": 0.25}, "kl_by_window": [0.25, 0.25],
        "flip_by_window": [0.0, 0.5],
    }  # fmt: skip
    return Result(**(values | changes))


def whole(**changes) -> Result:
    others = (
        make("reference", policy=REFERENCE_POLICY, kl_mean=0.0),
        make("plain", policy="ps4+none", kl_mean=2.5),
        make("random-like", policy="ps4+random-like:strict:0.1", kl_mean=2.0),
    )
    return make(comparisons=others, **changes)


def test_json_round_trip():
    result = whole()
    assert Result.from_json(result.to_json()) == result


def test_json_has_the_keys_of_the_design():
    record = json.loads(whole().to_json())
    assert record.keys() >= DESIGN_KEYS
    assert len(record["comparisons"]) == 3
    for comparison in record["comparisons"]:
        assert comparison.keys() == record.keys() - {"comparisons"}


def test_json_is_strict():
    text = whole(
        kl_mean=math.nan, perplexity=math.inf, kl_percentiles={"50": math.nan, "max": math.inf}
    ).to_json()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert record["kl_mean"] is None
    assert record["perplexity"] is None
    assert record["kl_percentiles"] == {"50": None, "max": None}
    back = Result.from_json(text)
    assert math.isnan(back.kl_mean)
    assert math.isnan(back.kl_percentiles["max"])


@pytest.mark.parametrize("text", ["[1]", "{}", '{"model": "m"}', "not json"])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError):
        Result.from_json(text)


def test_unknown_keys_are_dropped():
    record = whole().to_dict() | {"from_the_future": 1}
    assert Result.from_dict(record) == whole()


def test_results_of_the_first_version_are_read():
    record = whole().to_dict()
    for entry in (record, *record["comparisons"]):
        for name in ("kl_by_window", "flip_by_window", "block_rates"):
            del entry[name]
    assert Result.from_dict(record).kl_by_window == []
    assert Result.from_dict(record).recompute_rate == 0.25


def printed(result: Result, width: int = 80) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_result(result, console)
    return console.export_text()


def test_table_fits_a_terminal_and_has_a_row_for_each_run():
    text = printed(whole())
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = {label(r): r for r in (whole(), *whole().comparisons)}
    assert list(rows) == ["ps4+strict:0.1", "float32", "plain ps4", "random control"]
    for name in rows:
        assert name in text
    assert "10x" in text  # 2.5 / 0.25
    assert "1.25x" in text
    assert "dequantised" in text


def test_table_without_baselines_and_with_figures_that_are_not_finite():
    text = printed(
        make(kl_mean=math.nan, kl_standard_error=math.nan, perplexity=math.inf, rms_delta_p=math.nan)
    )
    assert "nan" not in text.lower()
    assert "inf" not in text.lower()


def test_partial_is_said():
    assert "PARTIAL" in printed(whole(partial=True))
    assert "one window only" in notes(whole(windows=1))[0]
