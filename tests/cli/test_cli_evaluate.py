import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import error_line, run

from tiny import TEXT
from torchlamp.evaluation import loop

SIZES = ["--windows", "2", "--window-length", "16"]


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def tiny_evaluate(tiny_folder, text) -> list[str]:
    """The beginning of a command that takes a second."""
    return ["evaluate", str(tiny_folder), "--text", str(text), *SIZES]


def test_evaluate_prints_a_table_and_writes_json(tiny_evaluate, tmp_path, tiny_folder):
    out = tmp_path / "out.json"
    result = run(*tiny_evaluate, "--accumulate", "ps2", "--rule", "strict:0.05", "--json", out)
    assert result.exit_code == 0, result.output
    for label in ("float32", "plain ps2", "ps2+strict:0.05", "random control", "dequantised", "32 tokens"):
        assert label in result.stdout
    assert "window 2/2: KL " in result.stderr
    record = json.loads(out.read_text())
    assert record["model"] == str(tiny_folder)
    assert record["policy"] == "ps2+strict:0.05"
    assert (record["windows"], record["window_length"], record["partial"]) == (2, 16, False)
    assert [c["role"] for c in record["comparisons"]] == ["reference", "plain", "random-like"]


def test_compared_policies_are_rows_of_their_own(tiny_evaluate):
    others = ["--compare", "ps2+strict:0.05", "--compare", "ps3+running:0.01"]
    result = run(*tiny_evaluate, "--policy", "ps2+running:0.01", *others, "--json", "-")
    record = json.loads(result.stdout)
    compared = {c["policy"]: c["role"] for c in record["comparisons"]}
    assert list(compared.values()) == ["reference", "plain", "compared", "compared", "random-like"]
    assert [spelling for spelling, role in compared.items() if role == "compared"] == others[1::2]
    table = result.stderr[result.stderr.index("float32") :]
    rows = [
        table.index(row) for row in ("plain ps2", "ps2+strict:0.05", "ps3+running:0.01", "ps2+running:0.01")
    ]
    assert rows == sorted(rows)
    alone = run(*tiny_evaluate, "--policy", "ps3+running:0.01", "--no-baselines", "--json", "-")
    assert json.loads(alone.stdout)["kl_mean"] == record["comparisons"][3]["kl_mean"]


def test_defaults_are_ps4_and_strict(tiny_evaluate):
    result = run(*tiny_evaluate, "--no-baselines", "--json", "-")
    record = json.loads(result.stdout)
    assert record["policy"] == "ps4+strict:0.1"
    assert record["comparisons"] == []
    assert "ps4+strict:0.1" in result.stderr  # the table makes room for the JSON


def test_policy_is_another_spelling(tiny_evaluate):
    one = json.loads(run(*tiny_evaluate, "--policy", "scores=ps3/unfused+mass:0.5", "--json", "-").stdout)
    two = json.loads(
        run(*tiny_evaluate, "--accumulate", "ps3/unfused", "--rule", "mass:0.5", "--json", "-").stdout
    )
    assert one["policy"] == two["policy"]
    assert one["kl_mean"] == two["kl_mean"]


@pytest.mark.parametrize("repeat", [True, False])
def test_several_texts(tiny_folder, text, tmp_path, repeat):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[9:])
    files = ["--text", text, "--text", other] if repeat else ["--text", text, other]
    result = run("evaluate", tiny_folder, *files, *SIZES, "--no-baselines", "--json", "-")
    record = json.loads(result.stdout)
    assert record["windows"] == 4
    assert record["text"] == f"{text}, {other}"


def test_threads_do_not_change_results(tiny_evaluate):
    threads = torch.get_num_threads()
    try:
        results = [json.loads(run(*tiny_evaluate, "--threads", n, "--json", "-").stdout) for n in (1, 2)]
    finally:
        torch.set_num_threads(threads)
    assert [r["environment"]["threads"] for r in results] == [1, 2]
    assert results[0]["kl_mean"] == pytest.approx(results[1]["kl_mean"], rel=1e-6)


BAD_ARGUMENTS = {
    "format": ("--accumulate ps99", "ps99"),
    "rule": ("--rule strikt:1", "unknown rule 'strikt'"),
    "parameter": ("--rule strict:-1", "strict:-1"),
    "site": ("--policy heads=ps4+none", "unknown site 'heads'"),
    "rule at a site": ("--policy mlp_up=ps4+mass:0.5", "can't run at the site mlp_up"),
    "compared policy": ("--compare ps99+none", "ps99"),
    "both spellings": ("--policy ps4+none --rule none", "leave out --accumulate and --rule"),
    "no file": ("--text missing.txt", "No such file"),
    "no text": ("--text prosa", "did you mean 'prose'?"),
    "not UTF-8": ("--text latin.txt", "not UTF-8: byte 0xe9 at offset 4"),
    "short text": ("--text short.txt", "tokens, but 2 windows of 16 need 32"),
    "context": ("--window-length 129", "window length 129 is longer than the model's context of 128"),
    "empty format": (["--accumulate", ""], "'' lacks an accumulator"),
    "empty rule": (["--rule", ""], "unknown rule ''"),
    "empty output": (["--json", ""], "it is a folder"),
    "no folder": ("--json missing/out.json", "there is no folder"),
    "a folder": ("--json .", "it is a folder"),
    "windows": ("--windows 0", "0 windows"),
    "threads": ("--threads 0", "--threads 0"),
    "many threads": ("--threads 99999999999", "--threads 99999999999: give 1 to"),
    "seed": ("--seed -1", "seed -1"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_input_gives_one_line(tiny_folder, text, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"abc \xe9")
    Path("short.txt").write_text("the fox")
    arguments, said = BAD_ARGUMENTS[case]
    arguments = arguments.split() if isinstance(arguments, str) else arguments
    default_text = [] if "--text" in arguments else ["--text", text]
    assert said in error_line(run("evaluate", tiny_folder, *SIZES, *default_text, *arguments))


def test_an_unwritable_output_is_found_before_the_work(tmp_path):
    """Before the model is even looked for."""
    assert "no folder" in error_line(run("evaluate", "no.gguf", "--json", tmp_path / "missing" / "out.json"))


@pytest.mark.parametrize("arguments", ["--windows 0", "--window-length 1", "--seed -1", f"--seed {2**64}"])
def test_impossible_sizes_are_found_before_the_model_is_loaded(arguments):
    assert "no.gguf" not in error_line(run("evaluate", "no.gguf", *arguments.split()))


def test_stray_arguments(tiny_folder, text):
    assert "unexpected argument 'b'" in error_line(run("evaluate", tiny_folder, "b"))
    mixed = error_line(run("evaluate", tiny_folder, "--text", text, "b", "--text", text))
    assert "unexpected argument 'b'" in mixed


def test_unknown_model():
    assert "no file 'no.gguf'" in error_line(run("evaluate", "no.gguf"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_still_prints_the_table(tiny_evaluate):
    result = run(*tiny_evaluate, "--json", "/dev/full")
    assert result.exit_code == 2
    assert "random control" in result.stdout
    assert "No space left" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd on this system")
def test_output_to_a_pipe(tiny_evaluate):
    """As a shell's `--json >(gzip > out.gz)` does it."""
    reading, writing = os.pipe()
    with open(reading) as pipe:
        with open(writing, "w"):
            result = run(*tiny_evaluate, "--no-baselines", "--json", f"/dev/fd/{writing}")
        assert result.exit_code == 0, result.output
        assert json.loads(pipe.read())["windows"] == 2


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_output_to_standard_output(tiny_evaluate, name):
    assert json.loads(run(*tiny_evaluate, "--no-baselines", "--json", name).stdout)["windows"] == 2


@pytest.mark.skipif(os.name == "nt", reason="pipes of Unix")
def test_a_reader_that_has_gone_leaves_the_json(tiny_evaluate, tmp_path):
    out = tmp_path / "out.json"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "torchlamp", *tiny_evaluate, "--no-baselines", "--json", out]
    subprocess.run(command, stdout=writing, stderr=subprocess.DEVNULL, check=False, timeout=60)
    os.close(writing)
    assert json.loads(out.read_text())["windows"] == 2


def interrupt_after(monkeypatch, passes: int) -> None:
    original = loop.Loop._report

    def report(self, *arguments) -> None:
        original(self, *arguments)
        if self._passes == passes:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "_report", report)


def test_interruption_reports_what_is_finished(tiny_evaluate, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 6)
    out = tmp_path / "out.json"
    result = run(*tiny_evaluate, "--json", out)
    assert result.exit_code == 130
    assert "PARTIAL" in result.stdout
    assert "interrupted after 1 of 2 windows" in result.stderr
    record = json.loads(out.read_text())
    assert (record["partial"], record["windows"]) == (True, 1)


def test_interruption_at_once(tiny_evaluate, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 2)
    out = tmp_path / "out.json"
    result = run(*tiny_evaluate, "--json", out)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
@pytest.mark.parametrize(
    ("signals", "code", "said"),
    [
        ([signal.SIGINT] * 3, 130, "interrupted"),
        ([signal.SIGTERM, signal.SIGINT], 143, "terminated"),
    ],
)
def test_whatever_ends_it_writes_what_is_finished(tiny_folder, text, tmp_path, signals, code, said):
    out = tmp_path / "out.json"
    text.write_text(TEXT * 200)
    command = [sys.executable, "-m", "torchlamp", "evaluate", tiny_folder, "--text", text, "--json", out]
    size = ["--windows", "1000", "--window-length", "64"]
    with subprocess.Popen(
        [*command, *size], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("window 1/1000")
        for number in signals:
            process.send_signal(number)
            time.sleep(0.03)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "PARTIAL" in output
    assert "Traceback" not in errors
    assert f"torchlamp: {said} after " in errors.splitlines()[-1]
    record = json.loads(out.read_text())
    assert record["partial"]
    assert 1 <= record["windows"] < 1000
