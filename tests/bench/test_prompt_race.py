"""The race of prompts: whom it times, its KL, and what is said of models."""

import pytest
import torch
from typer.testing import CliRunner

from torchlamp.bench.decode import EIGHT_BITS, LOOKAHEAD, REFERENCE
from torchlamp.bench.prompt import BFLOAT16, KL_TOKENS, Q8, race, readers
from torchlamp.cli import app

VOCABULARY = 11


class Recorded:
    """A contestant that hands out logits which were drawn before."""

    def __init__(self, logits):
        self.logits_, self.read, self.closed = logits, [], False

    def prefill(self, tokens):
        self.read.append(len(tokens))

    def logits(self, tokens):
        return self.logits_[: len(tokens)]

    def close(self):
        self.closed = True


@pytest.mark.parametrize("length", [7, KL_TOKENS + 5])
def test_kl_of_the_whole_prompt_and_the_targets(length):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (length + 1,), generator=generator)
    logits = 3 * torch.randn(length, VOCABULARY, generator=generator)
    noise = torch.randn(length, VOCABULARY, generator=generator)
    levels = {REFERENCE: 0.0, BFLOAT16: 0.03, LOOKAHEAD: 0.001, EIGHT_BITS: 0.01, Q8: 0.1}
    made = {label: Recorded(logits + level * noise) for label, level in levels.items()}
    bench = race({label: lambda r=r: r for label, r in made.items()}, tokens, 3)
    assert [timing.label for timing in bench.timings] == list(levels)
    kept = min(length, KL_TOKENS)
    for timing, (label, level) in zip(bench.timings, levels.items(), strict=True):
        assert made[label].read == [length] * 4
        assert made[label].closed
        assert timing.per_second == length / timing.median
        p, q = (x[:kept].double().log_softmax(-1) for x in (logits, logits + level * noise))
        want = float((p.exp() * (p - q)).sum(-1).mean())
        assert timing.kl == pytest.approx(want, rel=1e-6, abs=1e-12)
    by_label = {target.label: target for target in bench.targets}
    assert by_label[f"{LOOKAHEAD}: KL per token"].met
    assert by_label[f"{EIGHT_BITS}: KL / KL of {Q8}"].value == pytest.approx(0.01, rel=0.3)
    assert f"{LOOKAHEAD}: times the tokens/s of {REFERENCE}" in by_label


def test_contestants_without_llama_cpp():
    assert list(readers(None, None, 5)) == [REFERENCE, BFLOAT16, LOOKAHEAD, EIGHT_BITS]


def test_a_model_of_ones_own(tiny_folder):
    result = CliRunner().invoke(app, ["bench", "prompt", "--quick", "--model", str(tiny_folder)])
    assert result.exit_code == 0, result.output
    assert "128 tokens" in result.stdout
    assert "not judged" in result.stdout
    for label in (REFERENCE, BFLOAT16, LOOKAHEAD, EIGHT_BITS):
        assert label in result.stdout


@pytest.mark.parametrize("name", ["scores", "evaluate", "decode"])
def test_every_benchmark_takes_a_model(tiny_folder, name):
    result = CliRunner().invoke(app, ["bench", name, "--quick", "--model", str(tiny_folder)])
    assert result.exit_code == 0, result.output
    assert "MISSED" not in result.stdout


def test_a_context_too_short_for_a_benchmark(tiny_folder):
    result = CliRunner().invoke(app, ["bench", "attention", "--quick", "--model", str(tiny_folder)])
    assert result.exit_code != 0
    assert "a context of 128 tokens: windows of 2048 are read" in result.output.replace("\n", " ")
