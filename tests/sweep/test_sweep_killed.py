"""Sweeps that are really killed: nothing but the point being computed is lost, and the rest comes out the same."""

import multiprocessing
import os
import random
import signal
import time

import pytest
from sweeping import POINTS, figures, lines, make_study, run_sweep

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")


def sweep_in_a_process(config, output) -> None:
    run_sweep(config, output)


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchlamp.sweep.run", "transformers.models.llama.modeling_llama"])
    return context


def lines_in(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kill_9_again_and_again(tmp_path, tiny_folder, processes):
    config, out = make_study(tmp_path, tiny_folder), tmp_path / "out"
    results = out / "results.jsonl"
    draw = random.Random(5)
    kills = 0
    while kills < 4:
        process = processes.Process(target=sweep_in_a_process, args=(config, out))
        process.start()
        wanted = lines_in(results) + draw.randint(1, 4)
        deadline = time.monotonic() + 60
        while lines_in(results) < wanted and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        before = results.read_bytes()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        # What was there stays, and at most the line being written is torn.
        assert results.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
        kills += 1
    survived = lines_in(results)
    assert survived >= 4
    summary = run_sweep(config, out)
    assert summary.skipped == survived
    assert summary.done == POINTS - survived
    assert len(lines(out)) == POINTS
    run_sweep(config, tmp_path / "whole")
    assert figures(out) == figures(tmp_path / "whole")


def test_a_line_torn_by_a_kill(tmp_path, tiny_folder, caplog):
    config, out = make_study(tmp_path, tiny_folder), tmp_path / "out"
    run_sweep(config, out, limit=3)
    whole = figures(out)
    data = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(data[:-100])
    summary = run_sweep(config, out, limit=1)
    assert (summary.skipped, summary.done) == (2, 1)
    assert "is torn" in caplog.text
    assert (out / "results.torn-1").exists()
    assert figures(out) == whole
