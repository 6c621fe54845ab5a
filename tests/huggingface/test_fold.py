"""Folded transforms: plain models with the same logits, whose plain sums are the transformed ones."""

import logging

import pytest
import torch

import torchlamp
from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.transforms import Transform
from torchlamp.rules import Rule
from torchlamp.simulation.linear import linears, relative
from torchlamp.simulation.linear_sums import Weights

pytestmark = pytest.mark.usefixtures("no_grad")
MODELS = ("llama", "qwen2", "gemma3", "gpt2", "qwen3", "gemma2", "mistral")
EVERYTHING = (
    "scores=ps4.center.smooth.balance.hadamard.sort, qkv=ps5.center.smooth.sort, "
    "attention_out=ps5.center.smooth.balance.hadamard.sort, mlp_up=ps5.center.smooth.sort, "
    "mlp_down=ps5.smooth.sort, lm_head=ps5.center.smooth.sort"
)


def folded_with(model, policy, tokens):
    return torchlamp.fold(model, policy, torchlamp.calibrate(model, tokens(3, 40, seed=4), policy))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "policy",
    [
        EVERYTHING,
        "scores=ps4.sort",
        "qkv=ps5.smooth.sort, mlp_up=ps5.sort",
        "attention_out=ps5.sort",
        "mlp_down=ps5.sort",
        "lm_head=ps5.sort",
    ],
)
def test_logits_stay_the_same_and_weights_do_not(build, tokens, name, policy):
    model = build(name)
    before = parameters(model)
    folded = folded_with(model, policy, tokens)
    assert type(folded) is type(model)
    assert folded is not model
    expected = model(tokens(2, 30)).logits
    # A sum of a few dozen float32 terms in another order.
    close = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(folded(tokens(2, 30)).logits, expected, rtol=0, atol=close)
    assert all(torch.equal(before[key], p) for key, p in model.named_parameters())
    assert any(key not in before or not torch.equal(before[key], p) for key, p in folded.named_parameters())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
def test_it_is_saved_and_loaded_like_any_other(build, tokens, name, tmp_path):
    folded = folded_with(build(name), EVERYTHING, tokens)
    folded.save_pretrained(tmp_path)
    again, report = type(folded).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(again(tokens(1, 20)).logits, folded(tokens(1, 20)).logits)


def projections(model, path, tokens):
    """The input of a layer while the model runs, and the layer."""
    module, seen = model.get_submodule(path), []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(tokens(1, 30))
    hook.remove()
    return seen[0], module


@pytest.mark.parametrize(
    ("site", "path"), [("mlp_down", "model.layers.1.mlp.down_proj"), ("lm_head", "lm_head")]
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_plain_sums_are_the_sorted_ones_bit_for_bit(build, tokens, name, site, path):
    """The terms of the folded model's sum, in their order, are those that the transform gives the unfolded one."""
    model, policy = build(name), f"{site}=ps5.sort"
    calibration = torchlamp.calibrate(model, tokens(3, 40, seed=4), policy)
    folded = torchlamp.fold(model, policy, calibration)
    x, layer = projections(model, path, tokens)
    layer_number = -1 if site == "lm_head" else 1
    (moments,) = calibration.of(site, layer_number, (1, x.shape[-1]))
    energies = moments.energy[0] * layer.weight.double().square().mean(0)
    order = energies.argsort(stable=True)
    moved = folded.get_submodule(path).weight
    columns = layer.weight[:, order]
    assert torch.equal(moved, columns)
    how = {"accumulator": Accumulator.parse("ps5"), "rule": Rule.parse("none"), "next_function": relative}
    unfolded = linears(
        x, [Weights(layer.weight.T)], transforms=[Transform.parse("sort")], moments=moments, **how
    )
    plain = linears(x[..., order], [Weights(moved.T)], **how)
    assert torch.equal(plain.output, unfolded.output)


@pytest.mark.parametrize("site", ["mlp_down", "attention_out", "scores", "qkv", "lm_head"])
def test_narrow_sums_of_the_folded_model_err_less(build, tokens, site):
    """Channels of very different sizes, the largest first: the worst order, which folding mends."""
    model = build("llama")
    decay = torch.logspace(1.5, -1.5, 48)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.mul_(decay[:, None])
        layer.self_attn.v_proj.weight.mul_(decay[:16, None] ** 2)
        for projection, heads in ((layer.self_attn.q_proj, 4), (layer.self_attn.k_proj, 2)):
            projection.weight.unflatten(0, (heads, 2, 4))[:, 0].mul_(3)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
            norm.weight.mul_(decay[:32] ** 0.5)
    folded = folded_with(model, f"{site}=ps4.sort", tokens)
    windows = tokens(4, 40, seed=8)
    errors = [
        torchlamp.evaluate(each, windows, f"{site}=ps4", baselines=False).kl_mean for each in (model, folded)
    ]
    assert errors[1] < 0.9 * errors[0], errors


def test_what_cannot_be_folded_is_named_in_one_line(build, tokens, caplog):
    with caplog.at_level(logging.WARNING, logger="torchlamp.fold"):
        folded_with(build("llama"), "scores=ps4.center.sort, mlp_up=ps5.center.sort", tokens)
    lines = [record.getMessage() for record in caplog.records if record.name == "torchlamp.fold"]
    assert [line.split(", since ")[0] for line in lines] == [
        "not folded: center at scores",
        "not folded: center at mlp_up",
    ]
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("name", "policy", "reason"),
    [
        ("llama", "ps4.center", "center at scores, since rotary positions"),
        ("qwen3", "ps4.balance", "balance at scores, since norms whose weights all heads share"),
        ("qwen2", "attention_out=ps4.center", "no biases that could take the mean"),
        ("gpt2", "mlp_down=ps4.smooth", "smooth at mlp_down, since the activation"),
        ("gemma3", "lm_head=ps4.smooth", "its weight is the embedding's"),
        ("llama", "mlp_up=ps4.hadamard", "the norm in front of it scales each channel by itself"),
        ("gpt_oss", "ps4.sort", "parameters that folding doesn't know: sinks"),
    ],
)
def test_a_policy_of_which_nothing_folds_is_refused(build, tokens, name, policy, reason):
    with pytest.raises(ValueError, match=f"nothing of policy '{policy}' can be folded into .*{reason}"):
        folded_with(build(name), policy, tokens)


def test_bad_input(build, tokens):
    model = build("llama")
    calibration = torchlamp.calibrate(model, tokens(1, 8), "ps4.sort")
    with pytest.raises(ValueError, match="policy 'ps4' names no transform"):
        torchlamp.fold(model, "ps4", calibration)
    with pytest.raises(ValueError, match="no statistics of site mlp_down, layer 0: it was made for scores"):
        torchlamp.fold(model, "mlp_down=ps4.sort", calibration)
    with pytest.raises(ValueError, match="it was made for another model"):
        torchlamp.fold(build("gemma3"), "ps4.sort", calibration)
    with pytest.raises(TypeError, match="calibration=None is no Calibration"):
        torchlamp.fold(model, "ps4.sort", None)
    with pytest.raises(TypeError, match="Linear is no transformers model"):
        torchlamp.fold(torch.nn.Linear(2, 2), "ps4.sort", calibration)
    torchlamp.attach(model, "mlp_down=ps4")
    with pytest.raises(ValueError, match="a policy is attached to the model"):
        torchlamp.fold(model, "ps4.sort", calibration)


def test_an_architecture_that_is_not_what_its_names_say_is_refused(build, tokens):
    model = build("llama")
    calibration = torchlamp.calibrate(model, tokens(1, 30), "mlp_down=ps4.sort")
    ranked = torch.linspace(0.0, 1.0, 48)
    # Something between the neurons and the projection that has an order of its own.
    for layer in model.model.layers:
        layer.mlp.act_fn.forward = lambda x: torch.nn.functional.silu(x) * ranked
    with pytest.raises(ValueError, match=r"folding would change logits by .* isn't known"):
        torchlamp.fold(model, "mlp_down=ps4.sort", calibration)


def test_bicenter_is_left_to_the_run(build, tokens, caplog):
    folded_with(build("llama"), "scores=ps4.bicenter.balance", tokens)
    assert "bicenter" in caplog.text
    assert "weights have no place for the float32 sum" in caplog.text
