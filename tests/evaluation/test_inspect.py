"""What inspect records, against the model's own attention and the rule applied by hand; and its page's packing."""

import base64
import json
import math
import re

import numpy as np
import pytest
import torch

from tiny import TEXT
from torchlamp.evaluation.inspect import MAX_TOKENS, inspect
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.report.inspect_page import diagonal_shares, inspect_page

WORDS = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def seen(tiny):
    return inspect(*tiny, WORDS, "ps3+strict:0.2")


def test_the_choices_are_those_that_the_model_ran_with(tiny, seen):
    model, tokenizer = tiny
    ids = tokenizer(WORDS, return_tensors="pt")["input_ids"]
    with lookahead(model, "ps3+strict:0.2") as statistics, torch.no_grad():
        model(ids)
    assert list(seen.layers) == [0, 1]
    for number, layer in seen.layers.items():
        counts = statistics.head_counts(number)
        assert torch.equal(layer.chosen.sum(dim=(1, 2)), counts.selected)
        assert torch.equal(layer.visible.sum(dim=(1, 2)), counts.eligible)
        assert not (layer.chosen & ~layer.visible).any()
    assert seen.recompute_rate == pytest.approx(statistics.recompute_rate)
    assert "".join(seen.tokens) == WORDS


def test_scores_and_probabilities_belong_together(tiny, seen):
    model, tokenizer = tiny
    layer = seen.layers[0]
    softmax = layer.scores.masked_fill(~layer.visible, -math.inf).softmax(dim=-1)
    torch.testing.assert_close(layer.probabilities, softmax)
    assert layer.scores.isnan().equal(~layer.visible)
    # The first layer's input is the same with and without the policy: its exact scores give eager's attention.
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = tokenizer(WORDS, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        eager = model(ids, output_attentions=True).attentions[0][0]
    model.set_attn_implementation(before)
    exact = layer.exact.masked_fill(~layer.visible, -math.inf).softmax(dim=-1)
    torch.testing.assert_close(exact, eager, rtol=1e-4, atol=1e-6)
    strict = 2 * (1 - layer.probabilities) * layer.probabilities * layer.scores.abs() > 0.2
    assert (layer.chosen == (strict & layer.visible)).float().mean() > 0.999


def test_kl_is_zero_where_everything_is_exact(tiny):
    seen = inspect(*tiny, WORDS, "ps3+all")
    assert seen.recompute_rate == 1
    assert float(seen.kl.max()) < 1e-6
    assert float(inspect(*tiny, WORDS, "ps3+none").kl.mean()) > 1e-4


def test_longer_than_a_tile_and_other_sites(tiny):
    seen = inspect(*tiny, " ".join([WORDS] * 8), "scores=ps3+strict:0.2, mlp_up=ps7+none")
    length = len(seen.tokens)
    assert length > 64
    assert seen.layers[1].visible.sum(dim=-1)[0].tolist() == list(range(1, length + 1))
    assert seen.kl.shape == (length,)


@pytest.mark.parametrize(
    ("text", "policy", "message"),
    [
        ("", "ps3+none", "the text is empty"),
        (TEXT, "ps3+none", f"tokens: inspect shows at most {MAX_TOKENS}"),
        (WORDS, "mlp_up=ps4+none", "leaves the scores in float32"),
        (WORDS, "ps3+nonsense", "unknown rule 'nonsense'"),
    ],
)
def test_bad_input(tiny, text, policy, message):
    with pytest.raises(ValueError, match=message) as raised:
        inspect(*tiny, text, policy)
    assert "\n" not in str(raised.value)


def test_the_page_holds_what_was_recorded(seen):
    html = inspect_page(seen, "tiny <model>")
    assert "tiny &lt;model&gt;" in html
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
    layer, packed = seen.layers[1], data["layers"][1]
    lower = torch.ones(len(seen.tokens), len(seen.tokens)).tril().bool()
    count = 4 * int(lower.sum())

    def numbers(name, dtype):
        return np.frombuffer(base64.b64decode(packed[name]), dtype)

    bits = np.unpackbits(numbers("chosen", np.uint8), bitorder="little")[:count]
    assert np.array_equal(bits, layer.chosen[:, lower].numpy().reshape(-1))
    found = (numbers("probabilities", np.uint8) / 255.0) ** 2
    assert np.abs(found - layer.probabilities[:, lower].numpy().reshape(-1)).max() < 0.005
    exact = layer.exact[:, lower].numpy().reshape(-1)
    assert np.allclose(numbers("exact", "<f2").astype(np.float32), exact, rtol=1e-3, atol=1e-6)
    assert data["tokens"] == seen.tokens


def test_a_text_can_not_end_the_script(tiny):
    seen = inspect(*tiny, "the </script><b>fox", "ps3+none")
    assert "</script><b>" not in inspect_page(seen, "tiny")


def test_places_count_the_first_column_and_the_diagonals(tiny):
    everything = inspect(*tiny, WORDS, "ps3+all")
    n = len(everything.tokens)
    total = n * (n + 1) / 2
    shares = [int(re.match(r"\d+", share)[0]) for share in diagonal_shares(everything).values()]
    assert shares == [round(100 * n / total), round(100 * (n - 1) / total), round(100 * (n - 2) / total)]
    assert diagonal_shares(inspect(*tiny, WORDS, "ps3+none")) == {}


def test_each_modules_training_mode_is_put_back(tiny):
    model, tokenizer = tiny
    layer = model.model.layers[1]
    layer.train()
    try:
        inspect(model, tokenizer, WORDS, "ps3+strict:0.2")
        assert [module for module in model.modules() if module.training] == list(layer.modules())
    finally:
        model.eval()
