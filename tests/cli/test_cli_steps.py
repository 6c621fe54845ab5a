"""Bars for long work: what is told, and where something is drawn."""

import io
import time

import pytest
from rich.console import Console

from torchlamp.cli import steps as cli_steps
from torchlamp.cli.steps import shown_steps
from torchlamp.steps import Step, each, listening, work


def terminal(**options) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, **options)


def drawn(console: Console) -> str:
    return console.file.getvalue()


def run(console: Console, seconds: float = 0.3) -> str:
    with shown_steps(console):
        for _ in each("packing layers", range(3)):
            time.sleep(seconds / 3)
    return drawn(console)


def test_a_bar_is_drawn_and_taken_away(monkeypatch):
    monkeypatch.setattr(cli_steps, "_DELAY", 0.0)
    text = run(terminal())
    assert "packing layers" in text
    assert "/3" in text
    assert text.endswith("\x1b[2K")  # the line is empty at the end


def test_short_work_has_no_bar():
    assert run(terminal(), 0.03) == ""


def test_nothing_is_drawn_where_there_is_no_terminal_or_under_quiet(monkeypatch):
    monkeypatch.setattr(cli_steps, "_DELAY", 0.0)
    assert run(terminal(quiet=True), 0.1) == ""
    assert run(Console(file=io.StringIO()), 0.1) == ""


def test_an_error_ends_the_bar(monkeypatch):
    monkeypatch.setattr(cli_steps, "_DELAY", 0.0)
    console = terminal()

    def fail() -> None:
        with shown_steps(console), work("packing lm_head"):
            time.sleep(0.1)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert "packing lm_head" in drawn(console)
    length = len(drawn(console))
    time.sleep(0.3)
    assert len(drawn(console)) == length


def test_steps_of_nested_work():
    told: list[Step] = []
    with listening(told.append), work("reading"):
        assert list(each("converting", "ab")) == ["a", "b"]
    assert told == [
        Step("reading", 0, None),
        Step("converting", 0, 2),
        Step("converting", 0, 2),
        Step("converting", 1, 2),
        Step("converting", 2, 2),
        Step("converting", 2, 2, ended=True),
        Step("reading", 0, None, ended=True),
    ]
    assert list(each("unheard", [1, 2])) == [1, 2]
    assert len(told) == 7


def test_loading_preparing_and_inspecting_say_how_far_they_are(tiny, tmp_path, monkeypatch):
    from torchlamp.bench.gguf_export import write_gguf
    from torchlamp.evaluation.inspect import inspect
    from torchlamp.huggingface.prepare import prepare
    from torchlamp.models.load import load

    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "cache"))
    write_gguf(tiny[0], tmp_path / "tiny.gguf")
    # The file holds no tokenizer.
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tiny[1])
    told: list[Step] = []
    with listening(told.append):
        model, _ = load(str(tmp_path / "tiny.gguf"))
        inspect(*tiny, "the quick brown fox", "ps4+strict:0.1")
        with prepare(model):
            pass
    ended = {step.what: step for step in told if step.ended}
    tensors = ended["converting tiny.gguf"]
    assert tensors.done == tensors.total > 10
    assert ended["packing layers"].done == ended["inspecting layers"].done == 2
    assert {"reading tiny.gguf", "writing the converted copy", "packing lm_head"} <= set(ended)
