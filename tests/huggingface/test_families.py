"""Some rows of docs/families.md again, and what `prepare` leaves in full precision, and says."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from torchlamp.huggingface.prepare import prepare
from torchlamp.policy.sites import SITES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "families.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("families", DOCS / "figures" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "family",
    ["llama", "opt", "phi", "gpt_neox", "falcon", "lfm2", "deepseek_v3", "falcon_h1", "mixtral", "mamba"],
)
def test_rows_of_the_page(script, family):
    cells, why = script.row(family)
    assert f"| {' | '.join(cells)} |" in PAGE
    assert not why or f"- `{family}`: {'; '.join(why)}\n" in PAGE


def test_every_family_is_on_the_page(script):
    listed = PAGE[PAGE.index("| family |") :]
    assert all(f"`{family}`" in listed for family in script.families())
    assert f"| family | {' | '.join(SITES)} |" in PAGE


@pytest.mark.parametrize(
    ("family", "left", "said"),
    [
        ("opt", {"scores", "values", "qkv", "attention_out", "lm_head"}, "no MLP found|gated MLPs"),
        ("gpt_neox", {"scores", "values", "qkv", "attention_out", "lm_head"}, "gated MLPs"),
        ("falcon", {"lm_head"}, "attention interface"),
        (
            "falcon_h1",
            {"qkv", "attention_out", "mlp_up", "mlp_down", "lm_head"},
            "its cache holds more than keys",
        ),
        ("deepseek_v3", {"qkv", "attention_out", "lm_head"}, "makes keys and values of latent vectors"),
        (
            "doge",
            {"qkv", "attention_out", "mlp_up", "mlp_down", "lm_head"},
            "reads all keys or values in its dt_proj",
        ),
        ("moshi", {"scores", "values", "lm_head"}, "makes 24 numbers of 48 sums, by a gate"),
        ("longcat_flash", {"lm_head"}, "has 2 attentions"),
    ],
)
def test_prepare_leaves_out_what_it_can_not_decode(script, caplog, family, left, said):
    model = script.small_model(family)
    ids = torch.randint(2, 61, (1, 9), generator=torch.Generator().manual_seed(0))
    words = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, **words)
    with caplog.at_level(logging.WARNING, "torchlamp"), prepare(model) as prepared:
        assert set(prepared.policy.sites) == left
        assert model.generate(ids, **words).shape == want.shape
    assert "read in full precision, since" in caplog.text
    assert any(part in caplog.text for part in said.split("|"))
    assert torch.equal(model.generate(ids, **words), want)


@pytest.mark.parametrize("family", ["gemma4_text", "doge"])
def test_decoding_is_close_to_full_precision(script, family):
    """Gemma 4's layers have head sizes of their own; Doge makes its mask of the values in the cache."""
    from transformers import DynamicCache

    model = script.small_model(family)
    ids = torch.randint(2, 61, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits.log_softmax(-1)
        with prepare(model) as prepared:
            cache = (
                prepared.cache() if "scores" in prepared.policy.sites else DynamicCache(config=model.config)
            )
            parts = (ids[:, :16], *ids[:, 16:].split(1, dim=1))
            found = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1).log_softmax(
                -1
            )
    kl = (want.exp() * (want - found)).sum(-1).mean()
    assert 1e-9 < kl < 1e-4


def test_a_gate_in_one_module_is_refused(script):
    from torchlamp.huggingface.lookahead import lookahead

    with (
        pytest.raises(ValueError, match="MoshiGatingMLP\\) makes 24 numbers of 48 sums, by a gate"),
        lookahead(script.small_model("moshi"), "mlp_up=ps4+none"),
    ):
        pass


def test_parallel_sublayers_are_no_residual_sums(script):
    from torchlamp.huggingface.lookahead import lookahead

    model = script.small_model("gpt_neox")
    with (
        pytest.raises(ValueError, match="runs attention and MLP side by side"),
        lookahead(model, "norm=ps4+none"),
    ):
        pass
