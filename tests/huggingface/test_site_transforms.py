"""Transforms of the sums of values and of what norms read, in models: exact, calibrated, and better than none."""

import pytest
import torch

import torchlamp
from torchlamp.simulation.calibration import Calibration

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("policy", ["values=ps3.center.sort+all", "norm=ps3.center+all"])
def test_recomputing_all_is_the_model(build, tokens, name, policy):
    if name == "gpt_oss" and policy.startswith("norm"):
        policy = "values=ps3.center+strict:0"
    model = build(name)
    expected = model(tokens(2, 20)).logits
    calibration = torchlamp.calibrate(model, tokens(2, 12, seed=5), policy)
    for given in (None, calibration):
        with torchlamp.lookahead(model, policy, calibration=given):
            torch.testing.assert_close(model(tokens(2, 20)).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_means_are_those_of_the_values_and_of_each_norm(llama, tokens, tmp_path):
    calibration = torchlamp.calibrate(llama, tokens(2, 16), "values=ps4.center.sort, norm=ps4.center")
    seen = {}

    def note(name):
        def hook(module, given, output):
            seen[name] = (given[0], output)

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in llama.named_modules()
        if name.endswith(("v_proj", "layernorm", "model.norm"))
    ]
    llama(tokens(2, 16))
    for hook in hooks:
        hook.remove()
    (values,) = calibration.of("values", 1, (2, 8))
    expected = seen["model.layers.1.self_attn.v_proj"][1].double().mean((0, 1)).view(2, 8)
    torch.testing.assert_close(values.mean, expected, rtol=1e-5, atol=1e-6)
    for place, name in (
        ("attention", "layers.1.input_layernorm"),
        ("mlp", "layers.1.post_attention_layernorm"),
        ("final", "norm"),
    ):
        (inputs,) = calibration.of(f"norm/{place}", 1, (1, 32))
        expected = seen[f"model.{name}"][0].double().mean((0, 1))
        torch.testing.assert_close(inputs.mean[0], expected, rtol=1e-5, atol=1e-6)
    calibration.save(tmp_path / "means.safetensors")
    assert Calibration.load(tmp_path / "means.safetensors").hash == calibration.hash


@pytest.mark.parametrize("calibrated", [False, True])
def test_channels_with_a_large_mean_are_read_better(build, tokens, calibrated):
    """A channel of the stream that is always large, as massive activations are, no longer rounds coarsely."""
    model = build("llama")
    model.model.embed_tokens.weight[:, 3] += 40
    calibration = torchlamp.calibrate(model, tokens(3, 30, seed=4), "norm=ps4.center") if calibrated else None
    plain, centred = (
        torchlamp.evaluate(
            model, tokens(3, 30), policy, baselines=False, calibration=calibration if "." in policy else None
        )
        for policy in ("norm=ps4", "norm=ps4.center")
    )
    assert centred.kl_mean < plain.kl_mean


def test_a_prefix_is_read_the_same_without_what_follows(llama, tokens):
    """Calibrated transforms see one token after the other: later tokens change nothing before them."""
    policy = "values=ps4.center.sort, norm=ps4.center"
    calibration = torchlamp.calibrate(llama, tokens(3, 30, seed=4), policy)
    with torchlamp.lookahead(llama, policy, calibration=calibration):
        whole, part = llama(tokens(1, 20)).logits, llama(tokens(1, 20)[:, :12]).logits
    # Hidden keys have probability 0 and stand first; float32 sums of a row's probabilities may be formed otherwise.
    close = (whole[:, :12] - part).abs().amax(-1) < 1e-3
    assert close.float().mean() > 0.8
