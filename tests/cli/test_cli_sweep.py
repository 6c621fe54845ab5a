import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny import TEXT
from torchlamp.cli import app
from torchlamp.sweep import worker as sweep_worker

STUDY = """models: MODEL
texts: fox.txt
windows: 1
window_length: 16
policies: [ps2+none, "ps2+strict:0.1", ps3+none]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, tiny_folder, monkeypatch) -> Path:
    """The working directory, with a study of three points."""
    monkeypatch.chdir(tmp_path)
    Path("fox.txt").write_text(TEXT)
    Path("s.yaml").write_text(STUDY.replace("MODEL", str(tiny_folder)))
    return tmp_path


def sweep(*arguments: object):
    return CliRunner().invoke(app, ["sweep", "s.yaml", *map(str, arguments)])


def error_line(result) -> str:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("torchlamp: error: ")
    return lines[0]


def test_a_sweep_and_its_continuation():
    result = sweep("--output", "out", "--limit", 1)
    assert result.exit_code == 0, result.output
    assert "3 points: 1 computed" in result.stdout
    assert "2 left; results in out" in result.stdout
    assert "1/3: " in result.stderr
    assert "KL " in result.stderr
    assert "% recomputed" in result.stderr
    result = sweep("--output", "out")
    assert "3 points: 2 computed" in result.stdout
    assert "1 had a result" in result.stdout
    assert "1 of 3 points are done; next: " in result.stderr
    assert "left" in result.stderr
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 3


def test_dry_run_counts_and_estimates():
    result = sweep("--output", "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "grid 1       3 points, 3 to compute\n" in result.stdout
    assert "No results yet" in result.stdout
    assert not Path("out").exists()
    sweep("--output", "out", "--limit", 1)
    before = {p: p.read_bytes() for p in Path("out").iterdir()}
    result = sweep("--output", "out", "--dry-run")
    assert "all          3 points, 2 to compute, about " in result.stdout
    assert {p: p.read_bytes() for p in Path("out").iterdir()} == before


def test_fresh():
    sweep("--output", "out")
    assert "3 points: 3 computed" in sweep("--output", "out", "--fresh").stdout
    assert len(Path("out/old-1/results.jsonl").read_text().splitlines()) == 3


def test_failed_points_are_said(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(sweep_worker, "evaluate_against", fails)
    result = sweep("--output", "out")
    assert result.exit_code == 1
    assert "0 computed" in result.stdout
    assert "3 failed" in result.stdout
    assert "torchlamp: 3 points failed, the last one: " in result.stderr
    assert "out of luck" in result.stderr


BAD = {
    "engine": ("--output out --engine dask", "--engine 'dask': allowed are local and ray"),
    "limit": ("--output out --limit 0", "--limit 0: give 1 or more"),
    "workers": ("--output out --workers 2", "only --engine ray has workers"),
    "threads": ("--output out --threads 0", "--threads 0"),
    "a file": ("--output fox.txt", "'fox.txt': it is a file, give a folder"),
    "below a file": ("--output fox.txt/deeper", "can't sweep into 'fox.txt/deeper'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_give_one_line(case):
    arguments, said = BAD[case]
    assert said in error_line(sweep(*arguments.split()))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [a\n", "s.yaml, line 1, column 9: this is no YAML"),
        ("model: x\n", "s.yaml, line 1: unknown key 'model' in the configuration: did you mean 'models'?"),
        ("models: ./no\npolicies: ps4+none\n", "s.yaml, line 1: no model folder or .gguf file './no'"),
    ],
)
def test_bad_configurations_give_one_line(text, said):
    Path("s.yaml").write_text(text)
    assert said in error_line(sweep("--output", "out"))
    assert not Path("out").exists()


def test_no_configuration():
    Path("s.yaml").unlink()
    assert "configuration 's.yaml' can't be read: No such file" in error_line(sweep("--output", "out"))


def test_results_of_another_version():
    Path("out").mkdir()
    Path("out/results.jsonl").write_text('{"schema": "torchlamp-sweep/0"}\n')
    assert "schema 'torchlamp-sweep/0'" in error_line(sweep("--output", "out"))
    assert Path("out/results.jsonl").read_text() == '{"schema": "torchlamp-sweep/0"}\n'
    assert "3 points: 3 computed" in sweep("--output", "out", "--fresh").stdout


def test_a_full_disk_is_one_line_and_no_half_line(monkeypatch):
    sweep("--output", "out", "--limit", 1)
    before = Path("out/results.jsonl").read_bytes()

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr("torchlamp.sweep.folder.write_text", lambda *_: None)
        result = sweep("--output", "out")
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("torchlamp: error: can't write 'out/results.jsonl': No space left on device")
    assert Path("out/results.jsonl").read_bytes() == before
    assert "3 points: 2 computed" in sweep("--output", "out").stdout


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_control_c_in_a_process_of_its_own(folder):
    text = Path("s.yaml").read_text()
    thresholds = ", ".join(f"{n / 1000}" for n in range(1, 2000))
    Path("s.yaml").write_text(
        text + f'grids:\n- policies: {{policy: "ps2+strict:{{}}", thresholds: [{thresholds}]}}\n'
    )
    command = [sys.executable, "-m", "torchlamp", "sweep", "s.yaml", "--output", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("5/1999"):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ""
    assert "Traceback" not in errors
    records = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert 5 <= len(records) < 1999
    assert errors.splitlines()[-1] == (
        f"torchlamp: interrupted; {len(records)} of 1999 points are done, and the same command goes on from there"
    )
