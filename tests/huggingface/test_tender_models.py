"""Tender and integer registers in whole models: every site, and sums that overflow, counted and named."""

import json
import logging

import pytest
import torch

import torchlamp

pytestmark = pytest.mark.usefixtures("no_grad")
SITES = ("scores", "values", "qkv", "attention_out", "mlp_up", "mlp_down", "lm_head")


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    "precision", ["tender8/12", "tender8/12@int32", "int8/row@int32/shift", "int8@int32"]
)
def test_every_site_is_near_float32_and_full_with_all(site, precision, llama, tokens):
    exact = llama(tokens(2, 20)).logits
    with torchlamp.lookahead(llama, f"{site}={precision}") as stats:
        low = llama(tokens(2, 20)).logits
    assert 0 < (low - exact).norm() < 0.1 * exact.norm()
    assert stats.overflow_by_site[site][0] == 0 < stats.overflow_by_site[site][1]
    assert stats.warning is None
    with torchlamp.lookahead(llama, f"{site}={precision}+all"):
        torch.testing.assert_close(llama(tokens(2, 20)).logits, exact, rtol=1e-4, atol=1e-5)


def test_fake_quantised_and_integer_sums_agree(llama, tokens):
    everywhere = ", ".join(f"{site}=tender4/8@X" for site in SITES)
    logits = []
    for accumulator in ("int32/shift", "fp32"):
        with torchlamp.lookahead(llama, everywhere.replace("X", accumulator)):
            logits.append(llama(tokens(1, 24)).logits)
    # A number on the edge between two codes may fall to either side.
    assert (logits[0] - logits[1]).norm() < 0.02 * logits[1].norm()


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "gpt2"])
def test_other_families(family, build, tokens):
    model = build(family)
    exact = model(tokens(1, 12)).logits
    with torchlamp.lookahead(model, ", ".join(f"{site}=tender8/12" for site in SITES)):
        low = model(tokens(1, 12)).logits
    assert (low - exact).norm() < 0.2 * exact.norm()


def test_samples_of_a_batch_are_what_they_are_alone(llama, tokens):
    policy = ", ".join(f"{site}=tender4/8" for site in SITES)
    with torchlamp.lookahead(llama, policy):
        whole = llama(tokens(2, 20)).logits
        alone = llama(tokens(2, 20)[1:]).logits
    assert torch.equal(whole[1:], alone)


def test_sums_that_overflow_are_named_and_counted(llama, tokens, caplog):
    policy = "mlp_down=int16/row@int32"
    with torchlamp.lookahead(llama, policy) as stats:
        llama(tokens(1, 20))
    overflowed, sums = stats.overflow_by_site["mlp_down"]
    assert 0 < overflowed < sums == 2 * 20 * 32
    assert stats.warning == (
        f"at mlp_down {overflowed:,} of {sums:,} sums don't fit the register of int32 and wrapped around: take fewer "
        "bits or groups, or another accumulator"
    )
    assert stats.warning in str(stats)
    with caplog.at_level(logging.WARNING):
        result = torchlamp.evaluate(llama, tokens(1, 20), policy, baselines=False)
    assert result.overflowed_by_site == {"mlp_down": overflowed}
    assert stats.warning in caplog.text
    assert json.loads(result.to_json())["overflowed_by_site"] == {"mlp_down": overflowed}
    stats.reset()
    assert stats.overflow_by_site == {}


def test_compose_counts_and_warns():
    layer, x = torch.nn.Linear(8, 4), torch.ones(3, 8)
    torch.nn.init.ones_(layer.weight)
    stats = torchlamp.Statistics()
    torchlamp.compose(layer, torch.relu, x, "int16/row@int32", statistics=stats)
    assert stats.overflow_by_site == {"mlp_up": (12, 12)}
    with pytest.warns(RuntimeWarning, match="12 of 12 sums don't fit"):
        torchlamp.compose(layer, torch.relu, x, "int16/row@int32")
    low = torchlamp.compose(layer, torch.relu, torch.randn(300, 8), "tender8/4")
    assert low.isfinite().all()
    image = torch.randn(2, 3, 9, 9)
    convolution = torch.nn.Conv2d(3, 5, 3)
    low = torchlamp.compose(convolution, torch.relu, image, "tender8/8+none")
    assert (low - convolution(image).relu()).norm() < 0.05 * low.norm()


def test_decoding_has_no_kernel_for_it(llama):
    with pytest.raises(
        ValueError, match="precision 'tender4/8@int32/shift' at site qkv has no decoding kernel"
    ):
        torchlamp.prepare(llama, "qkv=tender4/8")
