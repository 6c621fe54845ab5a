import pytest
from commands import error_line, run
from typer.testing import CliRunner

from chat_folder import save_chat_folder
from torchlamp.cli import app


def test_generate(tiny_folder):
    result = run("generate", tiny_folder, "the quick brown", "--tokens", "5", "--policy", "ps4+strict:0.1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the quick brown")
    assert "5 tokens under ps4+strict:0.1: " in result.stdout
    assert "in full precision: scores " in result.stdout


def test_generate_low_bit_and_compare(tiny_folder):
    result = run("generate", tiny_folder, "the quick brown", "--tokens", "5", "--compare")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("the quick brown") == 2
    assert "5 tokens float32: " in result.stdout
    assert "5 tokens under look-ahead: " in result.stdout
    for said in ("scores ", "lm_head ", "memory: weights ", "times the tokens per second of float32", "same"):
        assert said in result.stdout
    alone = run("generate", tiny_folder, "the quick brown", "--tokens", "3", "--policy", "lm_head=int8")
    assert "3 tokens under lm_head=int8" in alone.stdout
    assert "'qvk'" in error_line(run("generate", tiny_folder, "the", "--policy", "qvk=int8"))


def test_generate_shows_no_special_tokens(tiny_folder):
    result = run("generate", tiny_folder, "<s>the quick</s> brown", "--tokens", "2")
    assert result.stdout.startswith("the quick brown")


def test_generate_refuses(tiny_folder):
    assert "the prompt is empty" in error_line(run("generate", tiny_folder, ""))
    assert "0 tokens" in error_line(run("generate", tiny_folder, "the", "--tokens", "0"))
    long = error_line(run("generate", tiny_folder, "the", "--tokens", "1000"))
    assert "1 + 1000 = 1001 is longer than the model's context of 128 tokens" in long
    assert "pss" in error_line(run("generate", tiny_folder, "the", "--policy", "pss+none"))


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (
            "qkv=mxfp4",
            "operand 'mxfp4' at site qkv has no decoding kernel: allowed at qkv are int4, int8, int12",
        ),
        ("qkv=mxfp4", "the nearest policy that runs is 'qkv=int4'"),
        (
            "qkv=int8, mlp_up=ps4",
            "the nearest policy that runs is 'qkv=int8, mlp_up=int8, mlp_down=int8+output:0.0006'",
        ),
        (
            "int8+running:0.1",
            "neither; the nearest policy that runs is 'scores=int8+running:0.1, values=",
        ),
    ],
)
def test_generate_names_the_nearest_policy_that_kernels_run(tiny_folder, policy, said):
    assert said in error_line(run("generate", tiny_folder, "the", "--policy", policy))


def test_generate_simulates_operands_beside_an_accumulator(tiny_folder):
    result = run("generate", tiny_folder, "the quick", "--tokens", "3", "--policy", "qkv=int8@ps7")
    assert result.exit_code == 0, result.output
    assert "3 tokens under qkv=int8@ps7+none: " in result.stdout


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


def test_chat_refuses(tiny_folder, tmp_path):
    assert "has no chat template" in error_line(run("chat", tiny_folder))
    assert "'qvk'" in error_line(run("chat", tiny_folder, "--policy", "qvk=int8"))
    folder = save_chat_folder(tmp_path)
    long = CliRunner().invoke(app, ["chat", str(folder)], input="the quick brown\n")
    assert "is longer than the model's context of 128 tokens" in error_line(long)
