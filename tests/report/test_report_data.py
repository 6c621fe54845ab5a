"""Reading sweeps: what a table holds, and what is refused."""

import json
import math

import pytest
import torch
from sample_sweep import point_line, point_of

from torchlamp.evaluation.cost import Shape, costs
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.report.data import read_report_data
from torchlamp.sweep.folder import open_folder


@pytest.fixture(scope="module")
def results(tiny):
    """A few real results by (policy, seed)."""
    model, _ = tiny
    windows = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    wanted = [("ps3+none", 0), ("ps3+strict:0.1", 0), ("ps3+random:0.1", 0), ("ps3+random:0.1", 1)]
    return {
        key: evaluate(
            model, windows, key[0], seed=key[1], baselines=False, model_name="tiny", blocks=True
        ).to_dict()
        for key in wanted
    }


def folder_of(path, lines):
    path.mkdir(exist_ok=True)
    (path / "results.jsonl").write_text("".join(lines))
    return path


def line(results, policy, seed=0, result=None, **changes):
    own = results[policy, seed] if result is None else result
    return point_line(point_of(policy, seed=seed, **changes), own)


def test_a_point_becomes_a_row(results, tmp_path):
    study = read_report_data([folder_of(tmp_path, [line(results, "ps3+strict:0.1")])])
    (row,) = study.points.to_dict("records")
    result = results["ps3+strict:0.1", 0]
    assert (row["site"], row["accumulate"], row["mu"], row["rule"], row["threshold"]) == (
        "scores",
        "ps3",
        3,
        "strict",
        0.1,
    )
    assert row["kl"] == result["kl_mean"]
    assert row["rate"] == result["recompute_rate"]
    assert row["layers"] == "all"
    assert row["realisable"]
    assert row["cost_tile_16x16"] >= row["cost_row_block_16"] >= row["cost_entry"] > 0
    assert not row["cost_estimated"]
    assert not study.notes
    cost = costs(Shape(24, 24, 8, causal=True), "ps3", "strict:0.1", row["rate"])["entry"]
    assert row["cost_entry"] == pytest.approx(cost.total)


@pytest.mark.parametrize(
    ("model", "depth", "note"), [("tiny", 64, True), ("gemma3-270m", 256, False), ("smollm2-135m", 64, False)]
)
def test_results_without_sizes(results, tmp_path, model, depth, note):
    """Of an older result the packaged model's sizes are known, GPT-2's assumed else; only that is noted."""
    older = {name: value for name, value in results["ps3+strict:0.1", 0].items() if name != "sizes"}
    lines = [line(results, "ps3+strict:0.1", result=older | {"model": model}, model=model)]
    study = read_report_data([folder_of(tmp_path, lines)])
    (row,) = study.points.to_dict("records")
    cost = costs(Shape(24, 24, depth, causal=True), "ps3", "strict:0.1", row["rate"])["entry"]
    assert row["cost_entry"] == pytest.approx(cost.total)
    assert len(study.notes) == note
    assert all("tiny" in text and "K = 64" in text for text in study.notes)


def test_seeds_are_averaged_with_their_spread(results, tmp_path):
    lines = [line(results, "ps3+random:0.1", seed) for seed in (0, 1)]
    (row,) = read_report_data([folder_of(tmp_path, lines)]).points.to_dict("records")
    first, second = (results["ps3+random:0.1", seed] for seed in (0, 1))
    assert first["kl_mean"] != second["kl_mean"]
    assert row["kl"] == pytest.approx((first["kl_mean"] + second["kl_mean"]) / 2)
    assert row["kl_se"] >= abs(first["kl_mean"] - second["kl_mean"]) / 2 * 0.999
    assert row["kl_by_window"][1] == pytest.approx((first["kl_by_window"][1] + second["kl_by_window"][1]) / 2)
    assert row["seeds"] == 2


def test_comparisons_are_points_too_and_the_reference_is_not(tiny, tmp_path):
    model, _ = tiny
    windows = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(3))
    result = evaluate(model, windows, "ps3+strict:0.1", model_name="tiny").to_dict()
    rules = set(
        read_report_data([folder_of(tmp_path, [point_line(point_of("ps3+strict:0.1"), result)])]).points[
            "rule"
        ]
    )
    assert rules == {"strict", "none", "random-like strict"}


def test_a_repeated_point_counts_once_and_success_beats_failure(results, tmp_path):
    failed = point_line(point_of("ps3+none"), None, "no memory")
    a = folder_of(tmp_path / "a", [line(results, "ps3+none"), failed])
    b = folder_of(tmp_path / "b", [failed, line(results, "ps3+strict:0.1"), line(results, "ps3+strict:0.1")])
    study = read_report_data([a, b])
    assert len(study.points) == 2
    assert study.failed == []


def test_failed_points_and_a_torn_last_line_are_told(results, tmp_path):
    lines = [
        line(results, "ps3+none"),
        point_line(point_of("ps3+strict:0.1"), None, "CUDA is away"),
        '{"schema": "torch',
    ]
    study = read_report_data([folder_of(tmp_path, lines)])
    assert [point["error"] for point in study.failed] == ["CUDA is away"]
    assert any("torn" in note for note in study.notes)


def test_results_that_are_not_finite_can_be_read(results, tmp_path):
    broken = results["ps3+none", 0] | {"kl_mean": None, "kl_by_window": [None, 0.1]}
    (row,) = read_report_data(
        [folder_of(tmp_path, [line(results, "ps3+none", result=broken)])]
    ).points.to_dict("records")
    assert math.isnan(row["kl"])


def test_no_folder_of_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results in .*--output folder of torchlamp sweep"):
        read_report_data([tmp_path])


def test_nothing_finished(tmp_path):
    with pytest.raises(ValueError, match="no finished point"):
        read_report_data([folder_of(tmp_path, [])])
    with pytest.raises(ValueError, match="all 1 points failed"):
        read_report_data([folder_of(tmp_path, [point_line(point_of("ps3+none"), None, "no memory")])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema": "torchlamp-sweep/2"},
            r"line 2: schema 'torchlamp-sweep/2' was written by another version, this one reads 'torchlamp-sweep/1'",
        ),
        ({"schema": None}, "schema None"),
        ({"status": "maybe"}, "status 'maybe'"),
        ({"point": {"model": "tiny"}}, "lacks text, tokens, policy"),
    ],
)
def test_other_versions_are_refused(results, tmp_path, change, message):
    other = json.loads(line(results, "ps3+strict:0.1")) | change
    with pytest.raises(ValueError, match=message):
        read_report_data([folder_of(tmp_path, [line(results, "ps3+none"), json.dumps(other) + "\n"])])


def test_a_broken_line_is_named(results, tmp_path):
    with pytest.raises(ValueError, match=r"line 1: .*repair or remove that line"):
        read_report_data([folder_of(tmp_path, ["{]\n", line(results, "ps3+none")])])
    lacking = json.loads(line(results, "ps3+none"))
    del lacking["result"]
    with pytest.raises(ValueError, match="lacks result"):
        read_report_data([folder_of(tmp_path, [json.dumps(lacking) + "\n"])])


def test_different_settings_can_not_share_a_figure(results, tmp_path):
    other = results["ps3+strict:0.1", 0] | {"windows": 8, "window_length": 512}
    lines = [line(results, "ps3+none"), line(results, "ps3+strict:0.1", result=other)]
    with pytest.raises(ValueError, match="2 windows of 24 and 8 windows of 512") as raised:
        read_report_data([folder_of(tmp_path, lines)])
    assert "\n" not in str(raised.value)


def test_models_may_be_measured_on_different_numbers_of_windows(results, tmp_path):
    other = results["ps3+strict:0.1", 0] | {"windows": 8, "window_length": 512}
    lines = [line(results, "ps3+none"), line(results, "ps3+strict:0.1", result=other)]
    lines[1] = lines[1].replace('"model": "tiny"', '"model": "other"')
    assert set(read_report_data([folder_of(tmp_path, lines)]).points["windows"]) == {2, 8}


def test_one_name_for_two_texts_is_refused(results, tmp_path):
    other = results["ps3+strict:0.1", 0] | {"tokens_sha256": "0" * 64}
    lines = [line(results, "ps3+none"), line(results, "ps3+strict:0.1", result=other)]
    with pytest.raises(ValueError, match="different tokens"):
        read_report_data([folder_of(tmp_path, lines)])


@pytest.mark.parametrize("layers", ["<img src=x>", ["<img src=x>"], [True], {"a": 1}, 3])
def test_layers_are_numbers(results, tmp_path, layers):
    lines = [line(results, "ps3+none", layers=layers)]
    with pytest.raises(ValueError, match="a list of layer numbers is expected, or null"):
        read_report_data([folder_of(tmp_path, lines)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"point": None}, "has the point None"),
        ({"point": "model text tokens policy"}, "has the point 'model text tokens policy'"),
        ({"point": 5}, "has the point 5"),
        ({"point": {"model": "m", "text": 3, "tokens": "real", "policy": "ps4"}}, "has the text 3"),
        ({"status": ["done"]}, "has status"),
        ({"result": None}, "has the result None"),
        ({"result": [1]}, "has the result"),
    ],
)
@pytest.mark.parametrize("reader", ["report", "sweep"])
def test_records_of_another_form(results, tmp_path, change, said, reader):
    record = json.loads(line(results, "ps3+none")) | change
    folder = folder_of(tmp_path, [line(results, "ps3+none"), json.dumps(record) + "\n"])
    read = {"report": lambda: read_report_data([folder]), "sweep": open_folder(folder).__enter__}[reader]
    with pytest.raises(ValueError, match=f"line 2.* {said}"):
        read()
