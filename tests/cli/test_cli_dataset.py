"""Data sets in ``torchlamp evaluate`` and ``sweep``: wiring, order, and one line for what is wrong."""

import json

import pytest
from typer.testing import CliRunner

from tiny import TEXT
from torchlamp.cli import app
from torchlamp.data import source as dataset_source

SIZES = ["--windows", "2", "--window-length", "16", "--no-baselines", "--json", "-"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"question": word + " "}) + "\n" for word in TEXT.split()))
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_a_data_set_equals_its_text(tiny_folder, data, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    one = run(tiny_folder, "--dataset", f"{data}:column=question", *SIZES)
    assert one.exit_code == 0, one.output
    one, two = json.loads(one.stdout), json.loads(run(tiny_folder, "--text", text, *SIZES).stdout)
    assert one["text"] == f"{data}:::question"
    assert one["kl_mean"] == two["kl_mean"]


def test_texts_come_before_data_sets(tiny_folder, data):
    record = json.loads(
        run(tiny_folder, "--dataset", data, "--text", "prose", "--dataset", data, *SIZES).stdout
    )
    assert record["text"] == f"prose, {data}, {data}"
    assert record["windows"] == 6


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gsm8k", "can't be reached from here"),
        ("gms8k", "did you mean 'gsm8k'"),
        ("no.jsonl", "no data set file"),
    ],
)
def test_errors_come_before_the_model_is_looked_for(monkeypatch, spec, said):
    monkeypatch.setattr(dataset_source, "hub_answers", lambda: False)
    result = run("no-model.gguf", "--dataset", spec)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("torchlamp: error: ")
    assert said in line


def test_too_short_a_data_set(tiny_folder, data):
    result = run(tiny_folder, "--dataset", data, "--windows", "500", "--window-length", "16")
    assert "windows of 16 need 8000" in result.stderr.splitlines()[-1]


def sweep(tmp_path, tiny_folder, texts: str):
    config = tmp_path / "study.yaml"
    config.write_text(
        f"models: {tiny_folder}\ntexts: {texts}\nwindows: 2\nwindow_length: 16\n"
        "accumulate: ps2\nrules: [{name: strict, target_rates: [0.1]}]\n"
    )
    return CliRunner().invoke(app, ["sweep", str(config), "--output", str(tmp_path / "out")])


def test_a_data_set_in_a_sweep(tiny_folder, data, tmp_path):
    """Its windows, and those of the calibration behind them, are those of the same text as a file."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    result = sweep(tmp_path, tiny_folder, f"['dataset:{data}:column=question', {text}]")
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    records = {r["point"]["text"]: r["result"] for r in map(json.loads, lines)}
    one, two = records[f"dataset:{data}:column=question"], records[str(text)]
    assert one["policy"] == two["policy"] != "ps2+strict:{}"
    assert one["kl_mean"] == two["kl_mean"]


def test_a_sweep_s_data_sets_are_checked_first(tiny_folder, tmp_path):
    result = sweep(tmp_path, tiny_folder, "[prose, 'dataset:gms8k']")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "did you mean 'gsm8k'" in line
    assert "line 2" in line
