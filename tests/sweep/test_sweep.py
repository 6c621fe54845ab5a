import json
import os

import pytest
import torch
from sweeping import POINTS, STUDY, figures, lines, make_study, run_sweep

from tiny import TEXT
from torchlamp.data.text import Text, cut_windows
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.results import journal
from torchlamp.results.result import Result
from torchlamp.sweep import worker as sweep_worker
from torchlamp.sweep.folder import open_folder, read_results
from torchlamp.sweep.points import Point
from torchlamp.sweep.worker import Worker, shuffled


@pytest.fixture
def config(tmp_path, tiny_folder):
    return make_study(tmp_path, tiny_folder)


def small(tmp_path, tiny_folder, policies: str, extra: str = ""):
    text = f"models: MODEL\ntexts: FOX\nwindows: 1\nwindow_length: 16\npolicies: {policies}\n{extra}"
    return make_study(tmp_path, tiny_folder, text)


def test_a_whole_sweep(config, tmp_path, tiny):
    seen = []
    summary = run_sweep(config, tmp_path / "out", progress=seen.append)
    assert (summary.total, summary.done, summary.failed, summary.left) == (POINTS, POINTS, 0, 0)
    assert [p.done for p in seen] == list(range(POINTS + 1))
    assert seen[0].remaining is None
    assert seen[1].remaining > 0
    assert seen[-1].current is None
    found = lines(tmp_path / "out")
    assert [r["key"] for r in found] == [p.key for p in config.points]
    assert found[0].keys() == {"schema", "key", "point", "status", "error", "seconds", "result"}
    model, tokenizer = tiny
    real = cut_windows(tokenizer, [Text("fox", TEXT)], 2, 24)
    for record in found:
        point, result = Point.from_dict(record["point"]), Result.from_dict(record["result"])
        windows = real if point.tokens == "real" else shuffled(real, point.seed)
        policy = point.policy if point.target_rate is None else result.policy
        assert result.block_rates["entry"] == result.recompute_rate_by_site["scores"]
        alone = evaluate(model, windows, policy, baselines=False, seed=point.seed, layers=point.layers)
        assert result.policy == policy
        assert (result.model, result.text) == (point.model, point.text)
        for name in (
            "kl_mean",
            "flip_rate",
            "recompute_rate",
            "kl_by_window",
            "recompute_rate_by_head",
            "tokens_sha256",
        ):
            assert getattr(result, name) == getattr(alone, name), (point, name)
    again = run_sweep(config, tmp_path / "out")
    assert (again.skipped, again.done) == (POINTS, 0)
    assert lines(tmp_path / "out") == found
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert record["schema"] == "torchlamp-sweep/1"
    assert record["configuration"]["windows"] == 2
    assert len(record["configuration_sha256"]) == 16
    assert [len(grid["points"]) for grid in record["grids"]] == [POINTS - 2, 2]
    assert record["torchlamp"]


def test_target_rates_are_found_on_other_windows_and_kept(config, tmp_path, monkeypatch):
    targets = [p for p in config.points if p.target_rate]
    run_sweep(config, tmp_path / "out")
    calibrations = [json.loads(x) for x in (tmp_path / "out" / "calibrations.jsonl").read_text().splitlines()]
    assert len(calibrations) == len(targets) == 4
    for record in calibrations:
        assert abs(record["rate"] - 0.1) <= 0.02 * 0.1
        assert record["calibration"]["calibration"]["start"] == 2
    found = {r["key"]: r for r in lines(tmp_path / "out")}
    for point in targets:
        assert found[point.key]["point"]["policy"].endswith("+strict:{}")
        assert "{" not in found[point.key]["result"]["policy"]
        assert 0.03 < found[point.key]["result"]["recompute_rate"] < 0.3
    before = figures(tmp_path / "out")
    (tmp_path / "out" / "results.jsonl").unlink()
    monkeypatch.setattr(sweep_worker, "find_threshold", lambda *_: pytest.fail("calibrated again"))
    run_sweep(config, tmp_path / "out")
    assert figures(tmp_path / "out") == before


def test_a_rate_out_of_reach_fails_in_one_line(tmp_path, tiny_folder):
    config = small(tmp_path, tiny_folder, '{policy: "ps23+strict:{}", target_rates: [0.999999]}')
    assert run_sweep(config, tmp_path / "out").failed == 1
    (record,) = lines(tmp_path / "out")
    assert record["result"] is None
    assert record["status"] == "failed"
    assert "target rate 0.999999 can't be reached" in record["error"]
    assert "\n" not in record["error"]


def test_shuffled_tokens_are_the_same_tokens():
    windows = torch.arange(60).view(3, 20)
    first, again, other = shuffled(windows, 1), shuffled(windows, 1), shuffled(windows, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, windows)
    assert torch.equal(first.flatten().sort().values, windows.flatten())
    # Across windows, not within them.
    assert not torch.equal(first.sort(dim=1).values, windows)


def test_failed_points_are_recorded_and_tried_again(tmp_path, tiny_folder, monkeypatch):
    config = small(tmp_path, tiny_folder, "[ps2+none, ps3+none, ps4+none]")
    original = sweep_worker.evaluate_against

    def fails(references, policy, **options):
        if policy == "ps3+none":
            raise RuntimeError("not enough memory\nframe #0")
        return original(references, policy, **options)

    monkeypatch.setattr(sweep_worker, "evaluate_against", fails)
    summary = run_sweep(config, tmp_path / "out")
    assert (summary.done, summary.failed, summary.left) == (2, 1, 0)
    assert "ps3+none: RuntimeError: not enough memory" in summary.last_error
    assert [r["status"] for r in lines(tmp_path / "out")] == ["done", "failed", "done"]
    assert lines(tmp_path / "out")[1]["error"] == "RuntimeError: not enough memory"
    monkeypatch.undo()
    assert run_sweep(config, tmp_path / "out").done == 1
    assert [r["status"] for r in lines(tmp_path / "out")] == ["done", "failed", "done", "done"]
    assert {r["key"]: r["status"] for r in read_results(tmp_path / "out")} == dict.fromkeys(
        (p.key for p in config.points), "done"
    )


def test_a_text_too_short_fails_its_points_only(tmp_path, tiny_folder):
    config = small(
        tmp_path,
        tiny_folder,
        "ps4+none",
        "grids:\n- window_length: 16\n- windows: 99999\n",
    )
    assert run_sweep(config, tmp_path / "out").failed == 1
    errors = [r["error"] for r in lines(tmp_path / "out")]
    assert errors[0] is None
    assert "tokens, but 99999 windows" in errors[1]


def test_a_model_that_can_not_be_loaded_is_tried_once(tmp_path, tiny_folder, monkeypatch):
    config = small(tmp_path, tiny_folder, "[ps2+none, ps3+none]")
    loads = []

    def load(name):
        loads.append(name)
        raise OSError("damaged")

    monkeypatch.setattr(sweep_worker, "load", load)
    assert run_sweep(config, tmp_path / "out").failed == 2
    assert len(loads) == 1
    assert all("damaged" in r["error"] for r in lines(tmp_path / "out"))


def test_limit(config, tmp_path):
    summary = run_sweep(config, tmp_path / "out", limit=3)
    assert (summary.done, summary.left) == (3, POINTS - 3)
    assert run_sweep(config, tmp_path / "out", limit=4).skipped == 3
    assert len(lines(tmp_path / "out")) == 7


def test_references_are_computed_once_for_a_group(tmp_path, tiny_folder, monkeypatch):
    config = small(tmp_path, tiny_folder, "[ps2+none, ps3+none, ps4+none]", "tokens: [real, shuffled]\n")
    calls = []
    original = sweep_worker.References.get

    def get(self, index):
        calls.append(index in self._kept)
        return original(self, index)

    monkeypatch.setattr(sweep_worker.References, "get", get)
    run_sweep(config, tmp_path / "out")
    assert calls == [False, True, True] * 2


def test_a_folder_is_held_by_one_sweep(tmp_path):
    with (
        open_folder(tmp_path / "out"),
        pytest.raises(BlockingIOError, match="another sweep is writing to"),
        open_folder(tmp_path / "out"),
    ):
        pass
    with open_folder(tmp_path / "out"):
        pass


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError, match="it is a file"), open_folder(tmp_path / "out"):
        pass
    with pytest.raises(OSError, match="can't sweep into"), open_folder(tmp_path / "out" / "deeper"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_fresh_moves_everything_aside(tmp_path, tiny_folder):
    config, out = small(tmp_path, tiny_folder, "ps4+none"), tmp_path / "out"
    for number in (1, 2):
        run_sweep(config, out)
        before = (out / "results.jsonl").read_bytes()
        with open_folder(out, fresh=True) as folder:
            assert folder.records == {}
        assert (out / f"old-{number}" / "results.jsonl").read_bytes() == before
        assert (out / f"old-{number}" / "sweep.json").exists()
        assert not (out / "results.jsonl").exists()
    with open_folder(out, fresh=True):
        assert not (out / "old-3").exists()


@pytest.mark.parametrize("name", ["results", "calibrations"])
def test_results_of_another_version_are_left_alone(tmp_path, tiny_folder, name):
    config, out = small(tmp_path, tiny_folder, "ps4+none"), tmp_path / "out"
    out.mkdir()
    (out / f"{name}.jsonl").write_text('{"schema": "torchlamp-sweep/9"}\n{"torn')
    (out / "results.jsonl").touch()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        ValueError, match=f"{name}.*schema 'torchlamp-sweep/9' was written by another version"
    ):
        run_sweep(config, out)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"} == before


def test_a_full_disk_stops_the_sweep(tmp_path, tiny_folder, monkeypatch):
    config, out = small(tmp_path, tiny_folder, "[ps2+none, ps3+none, ps4+none]"), tmp_path / "out"
    run_sweep(config, out, limit=1)
    before = (out / "results.jsonl").read_bytes()
    original = os.write

    def write(file, data):
        if b"torchlamp-sweep/1" in bytes(data):
            original(file, data[:50])
            raise OSError(28, "No space left on device")
        return original(file, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left on device; what was finished before is kept"):
        run_sweep(config, out)
    assert (out / "results.jsonl").read_bytes() == before
    monkeypatch.undo()
    assert run_sweep(config, out).done == 2


def test_a_worker_changes_models(tmp_path, tiny_folder, tiny):
    """Both are the same model by different names; the second drops what the first left."""
    worker = Worker(threads=None)
    (tmp_path / "fox.txt").write_text(TEXT)
    link = tmp_path / "link"
    link.symlink_to(tiny_folder)
    points = [
        Point(str(name), str(tmp_path / "fox.txt"), "real", 1, 16, "ps2+none", None, 0)
        for name in (tiny_folder, link)
    ]
    first, second = (worker.compute(point) for point in points)
    assert first.error is second.error is None
    assert first.result["kl_mean"] == second.result["kl_mean"]
    assert second.result["model"] == str(link)


def test_the_study_of_these_tests_has_every_kind_of_point(config):
    assert len(config.points) == POINTS
    assert "target_rates" in STUDY


def test_a_folder_reads_each_file_once_and_says_how_a_threshold_was_found(config, tmp_path, monkeypatch):
    run_sweep(config, tmp_path / "out")
    calibrations = [json.loads(line) for line in (tmp_path / "out" / "calibrations.jsonl").open()]
    assert {*calibrations[0]} == {"schema", "key", "calibration", "policy", "rate", "tries"}
    read = []

    read_lines = journal.read_lines

    def counted(path, schema):
        read.append(path.name)
        return read_lines(path, schema)

    monkeypatch.setattr(journal, "read_lines", counted)
    with open_folder(tmp_path / "out") as folder:
        assert len(folder.records) == POINTS
    assert read == ["results.jsonl", "calibrations.jsonl"]
