"""What every command has: -h, --quiet, --verbose; completion; text from standard input."""

import json
import os
import subprocess
import sys

import pytest
from commands import run
from typer.testing import CliRunner

from tiny import TEXT
from torchlamp.cli import app

SIZES = ["--windows", "2", "--window-length", "16", "--no-baselines"]


@pytest.mark.parametrize("command", ["evaluate", "sweep", "compare", "rules", "info"])
def test_every_command_has_short_help_and_verbosity(command):
    text = run(command, "-h").stdout
    assert "--quiet" in text
    assert "--verbose" in text


def test_the_arguments_of_another_program_are_its_own():
    assert "--quiet" not in run("lm-eval", "--help").stdout


def test_quiet_leaves_the_result_alone(tiny_folder, tmp_path):
    text = tmp_path / "fox.txt"
    text.write_text(TEXT)
    quiet = run("evaluate", tiny_folder, "--text", text, *SIZES, "--quiet")
    assert quiet.exit_code == 0
    assert quiet.stderr == ""
    assert "float32" in quiet.stdout
    assert "window 2/2" in run("evaluate", tiny_folder, "--text", text, *SIZES).stderr


def test_verbose_shows_where_an_error_came_from():
    result = run("evaluate", "no.gguf", "--policy", "ps99", "--verbose")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "Traceback" not in run("evaluate", "no.gguf", "--policy", "ps99").stderr
    both = run("info", "--quiet", "--verbose")
    assert "give one of them" in both.stderr


def test_text_from_standard_input(tiny_folder, tmp_path):
    arguments = ["evaluate", str(tiny_folder), *SIZES, "--json", "-", "--text"]
    piped = CliRunner().invoke(app, [*arguments, "-"], input=TEXT)
    assert piped.exit_code == 0, piped.output
    text = tmp_path / "fox.txt"
    text.write_text(TEXT)
    one, two = json.loads(piped.stdout), json.loads(run(*arguments, text).stdout)
    assert one["text"] == "standard input"
    assert one["tokens_sha256"] == two["tokens_sha256"]


def test_a_shell_completes_commands_and_models(tmp_path):
    (tmp_path / "small.gguf").touch()
    environment = os.environ | {"_TORCHLAMP_COMPLETE": "complete_bash"}

    def completed(words: str) -> list[str]:
        asked = environment | {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", "from torchlamp.cli import app; app(prog_name='torchlamp')"],
            env=asked, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.split()

    assert "evaluate" in completed("torchlamp ev")
    assert completed("torchlamp evaluate smo") == ["smollm2-135m"]
    assert completed("torchlamp evaluate sma") == ["small.gguf"]


@pytest.mark.skipif(os.name == "nt", reason="pipes of Unix")
def test_a_reader_that_has_gone_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "torchlamp", "formats", "--json"]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=60)
    finally:
        os.close(writing)
    assert done.stderr == b""
