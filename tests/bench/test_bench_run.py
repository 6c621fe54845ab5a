"""`torchlamp bench`: what it shows while it runs, and what is left when it is stopped."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from torchlamp.bench import run as bench_run
from torchlamp.bench.progress import progress
from torchlamp.bench.table import target_line, timings_table
from torchlamp.bench.turns import Bench, Target, Timing, Watch, interleaved, watch_turns
from torchlamp.cli import app

#: A benchmark with one part that ends, and one with a gigabyte of files that doesn't.
FAKE = """
import sys, tempfile, time
from pathlib import Path
from torchlamp.bench.turns import Bench, Target, Timing

def measure(watch):
    watch.step("first part", 1, 2)
    yield Bench("the first part", [Timing("one", 1.0, 1.0, 1.0)], [Target("figure", 1.0, 2.0)])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "big").write_bytes(b"0" * 1000)
        watch.so_far(Bench("the second part", [Timing("two", 2.0, 1.0, 3.0)], []))
        watch.step("second part", 1, 2)
        while not watch.quick:
            time.sleep(0.01)
"""
RUN = (
    "import torchlamp.bench.run as r; r.BENCHMARKS['fake'] = 'fake_bench'; "
    "from torchlamp.cli import main; main()"
)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_bench.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(bench_run.BENCHMARKS, "fake", "fake_bench")
    yield
    sys.modules.pop("fake_bench", None)


def test_a_quick_run_judges_nothing(fake, tmp_path):
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["bench", "fake", "--quick", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "figure: 1 (at most 2: not judged)" in result.stdout
    assert "{" not in result.stdout.splitlines()[-1]  # the footer is words
    assert "fake: first part, 1 of 2" in result.stderr
    record = json.loads(out.read_text())
    assert (record["quick"], record["partial"]) == (True, False)
    assert record["targets"][0]["met"] is None
    assert record["title"] == "the first part"


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_sigterm_leaves_the_figures_and_no_files(tmp_path):
    (tmp_path / "fake_bench.py").write_text(FAKE)
    out, temporary = tmp_path / "out.json", tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-c", RUN, "bench", "fake", "--json", out]
    surroundings = os.environ | {"PYTHONPATH": str(tmp_path), "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings
    ) as process:
        for line in process.stderr:
            if "second part" in line:
                break
        assert len(list(temporary.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "torchlamp: terminated"
    assert list(temporary.iterdir()) == []
    assert output.index("the first part") < output.index("PARTIAL (stopped): the second part")
    record = json.loads(out.read_text())
    assert record["partial"]
    assert [part["title"] for part in record["parts"]] == ["the first part", "the second part"]
    assert record["parts"][1]["timings"][0]["label"] == "two"


def test_turns_tell_the_figures_so_far():
    told, steps = [], []
    watch = Watch(step=lambda *step: steps.append(step), so_far=told.append)
    calls = {"one": lambda: None, "other": lambda: None}
    timings = interleaved(calls, 3, after_turn=watch_turns(watch, "turns", 3, lambda rows: rows[:1]))
    assert [len(bench.timings) for bench in told] == [1, 1, 1]
    assert told[-1] == Bench("turns", timings[:1], [])
    assert steps == [("turns", 1, 3), ("turns", 2, 3), ("turns", 3, 3)]


def test_a_real_one_runs_quickly():
    result = CliRunner().invoke(app, ["bench", "scores", "--quick"])
    assert result.exit_code == 0, result.output
    assert "scores: 9/3 heads, 256 tokens, size 64, 5 of 5" in result.stderr or "1 of 5" in result.stderr
    assert "ps4 causal / float32 full: " in result.stdout
    assert "MISSED" not in result.stdout


def test_progress_on_a_terminal_and_elsewhere():
    for terminal, said in ((False, "bench: turns, 1 of 2, 0 s\n"), (True, "bench: turns, 2 of 2")):
        out = io.StringIO()
        with progress("bench", Console(file=out, force_terminal=terminal, width=80)) as step:
            step("turns", 1, 2)
            step("turns", 2, 2)  # too soon for another line
        assert said in out.getvalue()
        assert terminal or out.getvalue() == said


@pytest.mark.parametrize(
    ("value", "limit", "said"),
    [
        (0.99961, 1.0, "x: 0.9996 (at least 1: MISSED)"),
        (1.0, 1.0, "x: 1 (at least 1: met)"),
        (1.2345, 1.0, "x: 1.23 (at least 1: met)"),
        (1 - 1e-12, 1.0, "x: 0.999999999999 (at least 1: MISSED)"),
        (1 + 1e-12, 1.0, "x: 1 (at least 1: met)"),
    ],
)
def test_a_figure_has_the_digits_that_tell_it_from_its_limit(value, limit, said):
    assert target_line(Target("x", value, limit, at_least=True)) == said


def test_one_time_has_one_column():
    def head(*timings):
        return [column.header for column in timings_table(Bench("t", list(timings), [])).columns]

    assert head(Timing("one", 1.0, 1.0, 1.0)) == ["", "ms"]
    assert head(Timing("one", 1.0, 1.0, 1.0), Timing("two", 1.0, 0.5, 2.0)) == [
        "",
        "median ms",
        "fastest",
        "slowest",
    ]
