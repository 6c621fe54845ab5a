import dataclasses
import json
import math

import pytest

from sample_result import whole
from torchlamp.results.result import Result

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


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Result) if f.name not in ("environment", "role")]
)
@pytest.mark.parametrize("value", [{"a": [1]}, [["<b>"]], "<b>word</b>", True, 0.5])
def test_values_of_other_types_are_refused_by_name(field, value):
    record = whole().to_dict()
    kind = type(record[field])
    if kind is type(value) and not isinstance(value, dict | list):
        assert getattr(Result.from_dict(record | {field: value}), field) == value
    elif (field, value) == ("calibration", "<b>word</b>"):  # None is allowed beside it
        assert Result.from_dict(record | {field: value}).calibration == value
    else:
        with pytest.raises(
            ValueError, match=f"this is no result of an evaluation: (its {field} is|a JSON object)"
        ):
            Result.from_dict(record | {field: value})


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "null", "3"])
def test_what_is_no_object(text):
    with pytest.raises(ValueError):
        Result.from_json(text)


def test_a_repl_and_a_notebook_show_a_table():
    text, html = repr(whole()), whole()._repr_html_()
    for name in ("float32", "plain ps4", "ps4+strict:0.1", "random control", "2 windows of 8 tokens"):
        assert name in text
        assert name in html
    assert html.count("<tr>") == 5
    assert "2.50e-01 ±2e-01" in text


def test_to_pandas():
    frame = whole().to_pandas()
    assert list(frame["role"]) == ["tested", "reference", "plain", "random-like"]
    assert list(frame["kl_mean"]) == [0.25, 0.0, 2.5, 2.0]
    assert {"flip_rate", "windows", "perplexity", "partial", "tokens_sha256"} <= set(frame.columns)


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr("torchlamp.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs pandas: run pip install 'torchlamp\[study\]'"):
        whole().to_pandas()
