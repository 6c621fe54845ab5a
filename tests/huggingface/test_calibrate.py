"""Calibrated transforms: collected on a text, saved, and exact all the same."""

import logging

import pytest
import torch

import torchlamp
from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.chain import moments_of
from torchlamp.simulation.calibration import Calibration

pytestmark = pytest.mark.usefixtures("no_grad")
POLICY = "scores=ps4.center.balance+strict:0.1, mlp_up=ps5.center.sort, lm_head=ps7.center"


def test_what_is_collected(llama, tokens):
    calibration = torchlamp.calibrate(llama, tokens(3, 20), POLICY)
    left, right = calibration.of("scores", 1, (2, 8))
    assert left.count.tolist() == [3 * 20 * 2] * 2  # two query heads share a key head
    assert right.count.tolist() == [3 * 20] * 2
    assert left.products is not None
    (inputs,) = calibration.of("mlp_up", 0, (1, 32))
    assert inputs.count.tolist() == [3 * 20]
    assert inputs.products is None
    assert len(calibration.of("lm_head", -1, (1, 32))) == 1


def test_the_statistics_are_those_of_the_calls(llama, tokens):
    one, both = tokens(1, 20), tokens(3, 20)
    seen = []
    with torchlamp.lookahead(llama, "fp32+none", observe=lambda layer, at: seen.append(layer)):
        llama(one)
    assert set(seen) == {0, 1}
    parts = [torchlamp.calibrate(llama, both[i : i + 1], POLICY) for i in range(3)]
    whole = torchlamp.calibrate(llama, both, POLICY)
    for at in (("scores", 1, (2, 8)), ("mlp_up", 0, (1, 32))):
        added = [sum(part.of(*at)[side].total for part in parts) for side in range(len(whole.of(*at)))]
        for total, moments in zip(added, whole.of(*at), strict=True):
            torch.testing.assert_close(moments.total, total)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_oss"])
def test_recomputing_all_is_the_model(build, name, tokens):
    model = build(name)
    calibration = torchlamp.calibrate(model, tokens(2, 12, seed=5), "ps3.center.sort+all")
    expected = model(tokens(2, 12)).logits
    with torchlamp.lookahead(model, "ps3.center.sort+all", calibration=calibration):
        torch.testing.assert_close(model(tokens(2, 12)).logits, expected, rtol=1e-4, atol=1e-4)


def test_on_its_own_text_a_calibration_of_one_window_is_the_dynamic_form(llama, tokens):
    window = tokens(1, 24)
    policy = "ps4.center.sort+none"
    calibration = torchlamp.calibrate(llama, window, policy)
    with torchlamp.lookahead(llama, policy, layers=[0]):
        dynamic = llama(window).logits
    with torchlamp.lookahead(llama, policy, layers=[0], calibration=calibration):
        assert torch.equal(llama(window).logits, dynamic)
        assert not torch.equal(llama(tokens(1, 24, seed=9)).logits, dynamic)


def test_save_load_and_hash(llama, tokens, tmp_path):
    calibration = torchlamp.calibrate(llama, tokens(2, 16), POLICY)
    calibration.save(tmp_path / "own.safetensors")
    again = Calibration.load(tmp_path / "own.safetensors")
    assert again.hash == calibration.hash
    assert torchlamp.calibrate(llama, tokens(2, 16, seed=3), POLICY).hash != calibration.hash
    with torchlamp.lookahead(llama, POLICY, calibration=calibration):
        expected = llama(tokens(1, 9)).logits
    with torchlamp.lookahead(llama, POLICY, calibration=again):
        assert torch.equal(llama(tokens(1, 9)).logits, expected)
    result = torchlamp.evaluate(llama, tokens(2, 16), POLICY, calibration=again)
    assert result.calibration == calibration.hash
    assert all(other.calibration == calibration.hash for other in result.comparisons)
    assert torchlamp.evaluate(llama, tokens(2, 16), "ps4", baselines=False).calibration is None


def test_what_is_refused(llama, build, tokens, tmp_path):
    with pytest.raises(ValueError, match="policy 'ps4' names no transform"):
        torchlamp.calibrate(llama, tokens(1, 8), "ps4")
    calibration = torchlamp.calibrate(llama, tokens(1, 8), "ps4.center")
    with (
        torchlamp.lookahead(llama, "mlp_up=ps4.center", calibration=calibration),
        pytest.raises(ValueError, match="no statistics of site mlp_up, layer 0: it was made for scores"),
    ):
        llama(tokens(1, 8))
    other = build("gemma3")
    with (
        torchlamp.lookahead(other, "ps4.center", calibration=calibration),
        pytest.raises(ValueError, match="it was made for another model"),
    ):
        other(tokens(1, 8))
    (tmp_path / "no").write_text("x")
    with pytest.raises(ValueError, match="is no calibration"):
        Calibration.load(tmp_path / "no")


def test_moments_of_operands_are_what_a_dynamic_transform_sees():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 5, 6, generator=g), torch.randn(2, 6, 7, generator=g)
    left, right = moments_of(a, b, [Transform.parse("balance")])
    torch.testing.assert_close(left.mean[1], a[2:].reshape(-1, 6).double().mean(0))
    torch.testing.assert_close(right.energy[0], b[0].double().square().mean(1))


def test_a_text_that_is_too_short(llama, tokens):
    with pytest.raises(
        ValueError,
        match="too short to calibrate: 1 finite vector of 1 token at site mlp_up, layer 0; give windows",
    ):
        torchlamp.calibrate(llama, tokens(1, 1), "mlp_up=ps4.center")
    with pytest.raises(ValueError, match=r"windows has shape .0, 8.: give .n, length. with n >= 1"):
        torchlamp.calibrate(llama, tokens(1, 8)[:0], "ps4.center")


def test_numbers_that_are_not_finite_are_no_statistics(build, tokens):
    model = build("llama")
    model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="0 finite vectors of 16 tokens at site scores, layer 1"):
        torchlamp.calibrate(model, tokens(1, 16), "ps4.center")


def test_a_calibration_without_what_a_transform_needs(llama, tokens):
    calibration = torchlamp.calibrate(llama, tokens(1, 40), "mlp_up=ps4.sort, attention_out=ps4.sort")
    with (
        torchlamp.lookahead(llama, "mlp_up=ps4.balance", calibration=calibration),
        pytest.raises(
            ValueError, match="hold no products of channels, which transform 'balance' needs: calibrate"
        ),
    ):
        llama(tokens(1, 8))
    with pytest.raises(ValueError, match="hold no products of channels, which transform 'balance' needs"):
        torchlamp.fold(llama, "attention_out=ps4.balance", calibration)


def test_singular_second_moments_are_said_and_stay_exact(llama, tokens, caplog):
    """Ten tokens span ten of 32 directions; the others are the regularisation's."""
    policy = "mlp_up=fp32.balance, scores=fp32.balance"
    with caplog.at_level(logging.WARNING, logger="torchlamp.calibrate"):
        calibration = torchlamp.calibrate(llama, tokens(1, 10), policy)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "singular second moments: balance at mlp_up has 10 vectors for 32 channels; they are"
    )
    expected = llama(tokens(2, 20)).logits
    with torchlamp.lookahead(llama, policy, calibration=calibration):
        torch.testing.assert_close(llama(tokens(2, 20)).logits, expected, rtol=2e-3, atol=2e-3)
    caplog.clear()
    torchlamp.calibrate(llama, tokens(2, 30), policy)
    assert not caplog.records


@pytest.mark.parametrize("names", ["bicenter.balance", "headwise.bicenter.balance"])
def test_heads_of_their_own_are_calibrated(build, tokens, names):
    """Statistics of the evaluated tokens themselves give what the call's own give."""
    model, policy = build("llama"), f"ps4.{names}+strict:0.01"
    windows = tokens(1, 40)
    calibration = torchlamp.calibrate(model, windows, policy)
    heads = model.config.num_attention_heads if "headwise" in names else model.config.num_key_value_heads
    assert calibration.of("scores", 0, (heads, model.config.head_dim))[0].count.shape == (heads,)
    with torchlamp.lookahead(model, policy, layers=[0], calibration=calibration), torch.no_grad():
        found = model(windows).logits
    with torchlamp.lookahead(model, policy, layers=[0]), torch.no_grad():
        torch.testing.assert_close(found, model(windows).logits, rtol=1e-4, atol=1e-5)
