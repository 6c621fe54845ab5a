"""Every engine on one model: figures of those that run, a line for those that don't."""

import json
from dataclasses import replace

import pytest
import torch

from torchlamp.bench import engines
from torchlamp.bench.engine_list import ENGINES, REFERENCE, Engine
from torchlamp.bench.engine_process import measured
from torchlamp.bench.engines import EngineError, prepared_spec, row
from torchlamp.bench.run import run
from torchlamp.bench.table import print_bench
from torchlamp.bench.turns import Bench

CONTEXTS = (8, 16)


@pytest.fixture
def spec(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "cache"))
    found, generic, contexts = prepared_spec(str(tiny_folder), tmp_path, quick=True)
    assert not generic
    assert contexts == found.contexts == (64,)
    return replace(found, contexts=CONTEXTS, steps=2, prompts=1)


def engine(label):
    return next(engine for engine in ENGINES if engine.label == label)


def test_figures_of_the_engines_that_are_always_there(spec):
    rows = {}
    threads = torch.get_num_threads()
    for label in (REFERENCE, "torch bfloat16", "torchlamp default", "torchlamp 8 bits", "torchlamp exact"):
        rows[label] = row(label, measured(engine(label), spec), CONTEXTS)
    assert torch.get_num_threads() == threads
    assert rows[REFERENCE].kl == rows["torchlamp exact"].kl == 0
    assert rows[REFERENCE].figures["top1"] == 1
    assert 0 < rows["torchlamp default"].kl < min(rows["torchlamp 8 bits"].kl, rows["torch bfloat16"].kl)
    assert 0 < rows["torchlamp default"].figures["prompt_kl"] < rows["torchlamp 8 bits"].figures["prompt_kl"]
    for timing in rows.values():
        for context in CONTEXTS:
            assert timing.figures[f"prompt_tokens/s_{context}"] > 0
            assert timing.figures[f"first_token_ms_{context}"] > 0
        assert timing.per_second == timing.figures[f"decode_tokens/s_{CONTEXTS[0]}"]
        assert {"load_s", "MB", "peak_MB", "base_MB"} <= timing.figures.keys()


def test_a_process_of_its_own_and_what_fails_in_it(spec, monkeypatch):
    measured(engine(REFERENCE), spec)  # writes its logits down
    figures = engines.run(engine("torch dynamic int8"), spec, 300)
    assert figures["kl"] > 0
    broken = replace(spec, windows=spec.windows + ".not")
    with pytest.raises(EngineError, match="failed: FileNotFoundError"):
        engines.run(engine("torch bfloat16"), broken, 300)
    with pytest.raises(EngineError, match=r"took more than 0.01 seconds"):
        engines.run(engine("torch bfloat16"), spec, 0.01)


def test_one_that_is_not_installed_or_fails_is_a_row(tiny_folder, monkeypatch, tmp_path, capsys):
    mine = (
        Engine(REFERENCE, lambda spec: None),
        Engine("of the future", lambda spec: None, ("no_such_module.inner",), "pip install tomorrow"),
        Engine("broken", lambda spec: None),
    )
    figures = {"kl": 0.0, "kl_error": 0.0, "top1": 1.0, "decode_tokens/s_64": 5.0}

    def fake(engine, spec, limit):
        if engine.missing():
            raise EngineError(f"{engine.missing()} isn't installed: {engine.install}")
        if engine.label == "broken":
            raise EngineError("failed: of old age")
        return dict(figures)

    monkeypatch.setattr(engines, "ENGINES", mine)
    monkeypatch.setattr(engines, "run", fake)
    found = run("engines", tmp_path / "out.json", quick=True, model=str(tiny_folder))
    assert [timing.label for timing in found[0].timings] == [REFERENCE]
    said = capsys.readouterr().out
    assert "of the future: no_such_module.inner isn't installed: pip install tomorrow" in said
    assert "broken: failed: of old age" in said
    assert "OpenVINO" in said
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["absent"]["broken"] == "failed: of old age"
    assert written["timings"][0]["figures"]["top1"] == 1.0


def test_figures_of_one_benchmark_have_columns(capsys):
    timing = row("an engine", {"kl": 0.5, "kl_error": 0.1, "top1": 0.25, "decode_tokens/s_8": 4.0}, (8,))
    print_bench(Bench("title", [timing], [], {"other": "why"}))
    said = capsys.readouterr().out
    assert "top1" in said
    assert "0.25" in said
    assert "other: why" in said
