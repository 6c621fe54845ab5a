"""Real language models: what the papers claim, and that the converted copies are the models.

The packages hold the models (`make test` installs them); where one is missing, these tests fail with the command.
"""

from typing import Any

import pytest
import torch

from torchlamp.data.text import cut_windows, default_text
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.evaluation.generation import generate
from torchlamp.models.conversion import convert
from torchlamp.models.load import load
from torchlamp.models.packaged import PACKAGED

pytestmark = pytest.mark.llm


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load("smollm2-135m")


@pytest.mark.parametrize("rule", ["running:0.02", "strict:0.2"])
def test_few_recomputed_scores_restore_the_model(smollm2, rule):
    """At ps4, under 2 % recomputation cuts the KL more than 15 times, the same number at random less than 2 times."""
    model, tokenizer = smollm2
    windows = cut_windows(tokenizer, [default_text()], 2, 512)
    result = evaluate(model, windows, f"ps4+{rule}")
    by_role = {c.role: c for c in result.comparisons}
    plain, control = by_role["plain"], by_role["random-like"]
    assert 0 < result.recompute_rate < 0.02
    assert control.recompute_rate == pytest.approx(result.recompute_rate, rel=0.1)
    assert plain.kl_mean / result.kl_mean > 15
    assert plain.kl_mean / control.kl_mean < 2
    assert result.flip_rate < plain.flip_rate / 2
    assert abs(result.log_perplexity_ratio) < abs(plain.log_perplexity_ratio)


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_converted_copy_is_the_packaged_model(name):
    model, tokenizer = load(name)
    with PACKAGED[name].gguf() as path:
        direct, direct_tokenizer = convert(path)
    text = default_text().content
    ids = tokenizer(text)["input_ids"]
    assert ids == direct_tokenizer(text)["input_ids"]
    assert tokenizer.all_special_ids == direct_tokenizer.all_special_ids
    assert tokenizer.chat_template == direct_tokenizer.chat_template
    assert tokenizer.decode(ids[:2000]) == direct_tokenizer.decode(ids[:2000])
    assert model.generation_config.eos_token_id == direct.generation_config.eos_token_id
    tokens = torch.tensor([ids[:32]])
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, direct(tokens).logits)


def test_gemma_runs_under_a_policy():
    model, tokenizer = load("gemma3-270m")
    windows = cut_windows(tokenizer, [default_text()], 1, 128)
    result = evaluate(model, windows, "ps4+strict:0.1")
    plain = next(c for c in result.comparisons if c.role == "plain")
    assert result.kl_mean < plain.kl_mean / 4
    assert len(result.recompute_rate_by_layer) == 18


def test_the_representative_and_the_rule_multiply(smollm2):
    """At ps4 the published rule cuts the KL; with centred keys and sorted terms it cuts it five times further."""
    model, tokenizer = smollm2
    windows = cut_windows(tokenizer, [default_text()], 1, 384)
    plain = evaluate(model, windows, "ps4+strict:0.1", baselines=False)
    changed = evaluate(model, windows, "ps4.center.sort+strict:0.1", baselines=False)
    assert changed.recompute_rate < 1.5 * plain.recompute_rate
    assert changed.kl_mean < plain.kl_mean / 5


def test_an_instruct_model_answers(smollm2):
    """Through its chat template; as a plain text, the question would be followed by the end of the text."""
    pieces: list[str] = []
    done = generate(*smollm2, "What is the capital of France?", None, 16, pieces.append)
    assert done.chat
    assert done.finish == "end"
    assert "Paris" in done.text
    assert "".join(pieces) == done.text
