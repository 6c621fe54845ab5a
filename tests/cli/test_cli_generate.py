import json

import pytest
import torch
from commands import error_line, run
from typer.testing import CliRunner

from chat_folder import save_chat_folder
from torchlamp.cli import app
from torchlamp.models.load import load


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


def test_exact_gives_the_text_of_float32(tiny_folder, tmp_path):
    asked = (
        "the quick brown",
        "--tokens",
        "40",
        "--exact",
        "--compare",
        "--json",
        str(tmp_path / "out.json"),
    )
    result = run("generate", tiny_folder, *asked)
    assert result.exit_code == 0, result.output
    assert "new tokens are the same" in result.stdout
    assert "tokens exact, drafted under look-ahead: " in result.stdout
    assert "drafted tokens accepted (" in result.stdout
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert found["exact"] is True
    assert found["token_ids"] == found["float32"]["token_ids"]
    assert 0 < found["acceptance"]["accepted"] <= found["acceptance"]["drafted"]
    assert "acceptance" not in found["float32"]
    simulated = run("generate", tiny_folder, "the", "--exact", "--policy", "ps4+strict:0.1")
    assert "kernel" in error_line(simulated)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_generate_on_a_half_precision_folder(tiny_folder, tmp_path, dtype):
    """It keeps its weights, and answers as its widened copy does."""
    model, tokenizer = load(str(tiny_folder))
    narrow = model.to(getattr(torch, dtype))
    narrow.save_pretrained(tmp_path / "narrow")
    narrow.float().save_pretrained(tmp_path / "wide")
    results = {}
    for name in ("narrow", "wide"):
        tokenizer.save_pretrained(tmp_path / name)
        given = ("the quick brown", "--tokens", "6", "--json", str(tmp_path / f"{name}.json"), "--compare")
        result = run("generate", tmp_path / name, *given)
        assert result.exit_code == 0, result.output
        results[name] = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    assert results["narrow"]["token_ids"] == results["wide"]["token_ids"]
    megabytes = [float(results[name]["memory"].split()[1]) for name in ("narrow", "wide")]
    assert megabytes[0] <= megabytes[1]


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


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return save_chat_folder(tmp_path_factory.mktemp("chat"))


def made(*arguments, **more) -> dict:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments), "--json", "-"], **more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_message_is_answered_where_the_model_has_a_template(chatty, tiny_folder):
    record = made(chatty, "the quick", "--tokens", "5")
    assert record["chat"]
    assert record["finish"] == "length"
    assert (record["tokens"], len(record["token_ids"])) == (5, 5)
    assert made(chatty, "the quick", "--tokens", "5", "--chat")["token_ids"] == record["token_ids"]
    continued = made(chatty, "the quick", "--tokens", "5", "--no-chat")
    assert not continued["chat"]
    assert continued["prompt_tokens"] < record["prompt_tokens"]
    assert (
        made(chatty, "the quick", "--tokens", "5", "--system", "over")["prompt_tokens"]
        > record["prompt_tokens"]
    )
    assert not made(tiny_folder, "the quick", "--tokens", "5")["chat"]
    shown = run("generate", chatty, "the quick", "--tokens", "5").stdout
    assert shown.startswith(record["text"] + "\n\n5 tokens under look-ahead: ")  # the message isn't repeated
    assert "has no chat template" in error_line(run("generate", tiny_folder, "the", "--chat"))
    assert "only a chat has one" in error_line(
        run("generate", chatty, "the", "--no-chat", "--system", "over")
    )


def test_a_prompt_from_a_file_and_from_standard_input(tiny_folder, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("the quick\nbrown\n")
    one = made(tiny_folder, "--file", path, "--tokens", "3")
    assert one["prompt"] == "the quick\nbrown"
    assert (
        made(tiny_folder, "-", "--tokens", "3", input="the quick\nbrown\n")["token_ids"] == one["token_ids"]
    )
    for wrong in ([], ["the", "--file", str(path)]):
        assert "give one of PROMPT, '-' for standard input, and --file FILE" in error_line(
            run("generate", tiny_folder, *wrong)
        )
    assert "can't be read" in error_line(run("generate", tiny_folder, "--file", tmp_path / "none.txt"))
    latin = CliRunner().invoke(app, ["generate", str(tiny_folder), "-"], input=b"abc \xe9")
    assert "standard input is not UTF-8" in error_line(latin)


def test_json(tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    result = run("generate", tiny_folder, "the quick", "--tokens", "4", "--compare", "--json", out)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["policy"] == "look-ahead"
    assert (record["float32"]["tokens"], record["tokens"]) == (4, 4)
    assert set(record["recompute_rate_by_site"]) >= {"scores", "lm_head"}
    assert result.stdout.startswith("the quick")
    assert "no folder" in error_line(
        run("generate", "no.gguf", "the", "--json", tmp_path / "no" / "out.json")
    )


def test_sampling(tiny_folder):
    """A seed repeats its text; other seeds, and nearly equal probabilities, give others."""
    options = (tiny_folder, "the quick", "--tokens", "20", "--temperature")
    hot = [made(*options, "100", "--seed", seed)["token_ids"] for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    greedy = made(*options[:-1])["token_ids"]
    assert made(*options, "1e-4")["token_ids"] == greedy
    assert made(*options, "100", "--top-p", "1e-9")["token_ids"] == greedy


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--temperature -1", "temperature -1.0: give 0"),
        ("--temperature nan", "temperature nan: give 0"),
        ("--temperature 1 --top-p 0", "top-p 0.0: give more than 0"),
        ("--top-p 0.9", "top-p 0.9 at temperature 0"),
        ("--seed -1", "seed -1: give 0 or more"),
        ("--tokens 0", "0 tokens to generate"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(arguments, said):
    for command in (["generate", "no.gguf", "the"], ["chat", "no.gguf"]):
        assert said in error_line(run(*command, *arguments.split()))


def test_what_ctrl_c_stops_is_kept(tiny_folder, tmp_path, monkeypatch):
    """The tokens made until then, as text and in the JSON."""
    from torchlamp.evaluation import text_stream

    original = text_stream.TextStream.put

    def put(self, value):
        original(self, value)
        if len(self.ids) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(text_stream.TextStream, "put", put)
    out = tmp_path / "out.json"
    result = run("generate", tiny_folder, "the quick", "--tokens", "9", "--json", out)
    assert result.exit_code == 130
    record = json.loads(out.read_text())
    assert (record["finish"], record["tokens"]) == ("interrupted", 3)
    assert result.stdout.startswith("the quick" + record["text"])
    assert "3 tokens under look-ahead, interrupted: " in result.stdout
