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


POLICY = "scores=tender8/8, qkv=tender8/8, mlp_down=tender8/8, values=tender8/8"


def test_calibrated_tables_of_the_same_text_are_those_of_the_call(llama, tokens, tmp_path):
    text = tokens(1, 40)
    calibration = torchlamp.calibrate(llama, text, POLICY)
    for policy in ("scores=tender8/8", "qkv=tender8/8"):
        # The first layer's operands are the same as in float32.
        own, logits = torchlamp.calibrate(llama, text, policy), []
        for known in (None, own):
            with torchlamp.lookahead(llama, policy, layers=[0], calibration=known):
                logits.append(llama(text).logits)
        assert torch.equal(*logits)
    calibration.save(tmp_path / "ranges.safetensors")
    again = torchlamp.Calibration.load(tmp_path / "ranges.safetensors")
    assert again.hash == calibration.hash
    left, right = again.ranges("scores", 1, (4, 8), (2, 8))
    assert torch.equal(left.low, calibration.ranges("scores", 1, (4, 8), (2, 8))[0].low)
    assert right.low.shape == (2, 1, 8)


def test_calibrated_ranges_are_those_of_all_windows(llama, tokens):
    seen, text = [], tokens(3, 20)
    layer = llama.model.layers[1].self_attn.q_proj
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    calibration = torchlamp.calibrate(llama, text, "qkv=tender4/8")
    hook.remove()
    ranges = calibration.ranges("qkv", 1, (1, 32))[0]
    x = torch.cat(seen).flatten(0, 1)
    assert torch.equal(ranges.low[0, 0], x.amin(0))
    assert torch.equal(ranges.high[0, 0], x.amax(0))


def test_static_tables_clip_what_they_have_not_seen(llama, tokens):
    exact = llama(tokens(2, 20)).logits
    calibration = torchlamp.calibrate(llama, tokens(3, 20, seed=5), POLICY)
    errors = []
    for known in (None, calibration):
        with torchlamp.lookahead(llama, POLICY, calibration=known):
            errors.append(float((llama(tokens(2, 20)).logits - exact).norm() / exact.norm()))
    assert 0 < errors[0] < errors[1] < 0.5
    result = torchlamp.evaluate(llama, tokens(1, 20), POLICY, calibration=calibration, baselines=False)
    assert result.calibration == calibration.hash
    # A step of decoding is row 0 of a chunk of its own.
    with torchlamp.lookahead(llama, POLICY, calibration=calibration):
        assert llama.generate(tokens(1, 8), max_new_tokens=3, do_sample=False).shape == (1, 11)


@pytest.mark.parametrize(
    ("made_for", "run", "message"),
    [
        ("mlp_up=tender4/8", "qkv=tender4/8", "no ranges of Tender's operand at site qkv, layer 0: it has those of"),
        ("mlp_up=ps4.center", "qkv=tender4/8", "it has those of no site; make one for this model and policy"),
    ],
)  # fmt: skip
def test_a_calibration_of_something_else(made_for, run, message, llama, tokens):
    calibration = torchlamp.calibrate(llama, tokens(2, 20), made_for)
    with (
        torchlamp.lookahead(llama, run, calibration=calibration),
        pytest.raises(ValueError, match=message),
    ):
        llama(tokens(1, 20))


def test_what_cannot_be_calibrated(llama, tokens, build):
    with pytest.raises(ValueError, match="can't be calibrated together with transforms"):
        torchlamp.calibrate(llama, tokens(2, 20), "qkv=tender4/8.center")
    with pytest.raises(ValueError, match="there is nothing to calibrate"):
        torchlamp.calibrate(llama, tokens(2, 20), "values=tender4/8")
    short = torchlamp.calibrate(llama, tokens(1, 20), "qkv=tender4/8, scores=tender4/8")
    for site in ("qkv", "scores"):
        with (
            torchlamp.lookahead(llama, f"{site}=tender4/8", calibration=short),
            pytest.raises(ValueError, match="chunks of 256, and Tender was calibrated on 1"),
        ):
            llama(torch.ones(1, 257, dtype=torch.int64))
    other = build("gemma3")
    with (
        torchlamp.lookahead(other, "scores=tender4/8", calibration=short),
        pytest.raises(ValueError, match="it was made for another model"),
    ):
        other(tokens(1, 20))
