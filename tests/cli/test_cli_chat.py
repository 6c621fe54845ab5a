import json
import os
import signal
import subprocess
import sys

import pytest
from commands import error_line, run
from typer.testing import CliRunner

from chat_folder import save_chat_folder
from torchlamp.cli import app


def test_chat(tmp_path):
    folder = save_chat_folder(tmp_path)
    arguments = ["chat", str(folder), "--tokens", "4", "--system", "fox"]
    result = CliRunner().invoke(app, arguments, input="the quick\nbrown fox\n\nnever read\n")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-2].startswith("8 tokens: ")
    assert lines[-1].startswith("in full precision: scores ")
    alone = CliRunner().invoke(app, [*arguments, "--policy", "ps4+none"], input="the quick")
    assert alone.exit_code == 0, alone.output
    assert "4 tokens: " in alone.stdout
    nothing = CliRunner().invoke(app, arguments, input="")
    assert nothing.exit_code == 0
    assert nothing.stdout == ""


def test_exact_answers_are_those_of_float32(tmp_path):
    """The second one with what the first left in the cache."""
    from torchlamp.evaluation.chat import Chat
    from torchlamp.models.load import load
    from torchlamp.policy.policy import Policy

    folder = save_chat_folder(tmp_path)
    result = CliRunner().invoke(
        app, ["chat", str(folder), "--tokens", "6", "--exact"], input="the quick\nbrown fox\n"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("exact: ")
    model, tokenizer = load(str(folder))
    with Chat(model, tokenizer, Policy.parse("ps23+all")) as talk:
        plain = [talk.say(message, 6, lambda _: None) for message in ("the quick", "brown fox")]
    assert result.stdout.startswith("\n".join(plain))


def test_chat_refuses(tiny_folder, tmp_path):
    assert "has no chat template" in error_line(run("chat", tiny_folder))
    assert "'qvk'" in error_line(run("chat", tiny_folder, "--policy", "qvk=int8"))
    folder = save_chat_folder(tmp_path)
    long = CliRunner().invoke(app, ["chat", str(folder)], input="the quick brown\n")
    assert "is longer than the model's context of 128 tokens" in error_line(long)


def test_chat_commands(tmp_path):
    folder = save_chat_folder(tmp_path)

    def told(*messages):
        result = CliRunner().invoke(app, ["chat", str(folder), "--tokens", "4"], input="\n".join(messages))
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    once = told("the quick")
    # After /clear the same message gets the same answer, and the cache holds that much again.
    again = told("the quick", "/clear", "the quick", "/stats", "/exit", "never read")
    assert again[:2] == [once[0]] * 2
    held = once[-2].rpartition("; ")[2]
    assert held.endswith(" tokens in the cache")
    assert again[2].startswith("8 tokens: ")
    assert again[2].endswith(held)
    assert told("/help", "/exit")[0].startswith("/clear begins a new conversation")
    assert "unknown command '/sats'" in told("/sats")[0]
    assert told("/etc/hosts is a file")[-2].startswith("4 tokens: ")


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_ctrl_c_stops_an_answer_and_not_the_program(tmp_path):
    folder = save_chat_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 5000}))
    command = [sys.executable, "-m", "torchlamp", "chat", folder, "--tokens", "4000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "TORCHLAMP_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        process.stdin.write("the quick\n")
        process.stdin.flush()
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        # Once the answer has ended, /stats is read: fewer than all tokens, and a cache that holds all but the last.
        output, errors = process.communicate("/stats\n", timeout=60)
    assert process.returncode == 0, errors
    assert errors == ""
    lines = (first + output).splitlines()
    tokens = int(lines[-2].split()[0])
    assert 1 <= tokens < 4000
    assert int(lines[-2].split()[-5]) > tokens
