"""What users hang on modules of a prepared model runs: hooks, forwards of their own, other classes."""

import copy

import pytest
import torch
from decoding_models import STEADY, decoded
from torch import nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from torchlamp.huggingface import decode_plan
from torchlamp.huggingface.prepare import prepare

pytestmark = pytest.mark.usefixtures("no_grad")
#: Modules of a layer; MLPs run natively in one piece, so hooks inside send them to full precision.
WATCHED = [
    "self_attn", "mlp", "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
    "mlp.act_fn", "input_layernorm", "post_attention_layernorm",
]  # fmt: skip


def scaled(value):
    """Outputs of modules, some of them tuples, times a number that no rounding hides."""
    return (value[0] * 1.5, *value[1:]) if isinstance(value, tuple) else value * 1.5


def after(module):
    return module.register_forward_hook(lambda module, given, result: scaled(result))


def after_with_keywords(module):
    return module.register_forward_hook(lambda module, given, words, result: scaled(result), with_kwargs=True)


def before(module):
    def hook(module, given, words):
        words = {k: scaled(v) if k == "hidden_states" else v for k, v in words.items()}
        return tuple(scaled(x) for x in given), words

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def own_forward(module):
    real = module.forward
    module.forward = lambda *given, **words: scaled(real(*given, **words))


def everywhere(module):
    """A hook on all modules of the process, which acts on one."""
    return nn.modules.module.register_module_forward_hook(
        lambda at, given, result: scaled(result) if at is module else None
    )


def everywhere_before(module):
    def hook(at, given):
        return tuple(scaled(x) for x in given) if at is module else None

    return nn.modules.module.register_module_forward_pre_hook(hook)


def module_by_module(monkeypatch, fused):
    if not fused:
        monkeypatch.setattr(decode_plan, "can_fuse", lambda layer, rows: False)


def run(build, tokens, monkeypatch, change, when, fused=True, at="mlp", name="llama"):
    """Logits of a prepared model that is changed before or after `prepare`."""
    model, x, handle = build(name), tokens(2, 14), None
    layer = model.model.layers[1]
    with monkeypatch.context() as patch:
        module_by_module(patch, fused)
        try:
            if when == "before":
                handle = change(layer.get_submodule(at))
            with prepare(model, STEADY) as prepared:
                if when == "after":
                    handle = change(layer.get_submodule(at))
                return decoded(model, x, prepared.cache())
        finally:
            if handle is not None:
                handle.remove()


def full(build, tokens, change, at, name="llama"):
    """Logits of the model as it is in full precision."""
    model = build(name)
    handle = change(model.model.layers[1].get_submodule(at))
    try:
        return decoded(model, tokens(2, 14), DynamicCache(config=model.config))
    finally:
        if handle is not None:
            handle.remove()


def assert_seen(build, tokens, monkeypatch, change, when, at, name="llama"):
    got = run(build, tokens, monkeypatch, change, when, at=at, name=name)
    slow = run(build, tokens, monkeypatch, change, when, fused=False, at=at, name=name)
    want = full(build, tokens, change, at, name)
    unchanged = full(build, tokens, lambda module: None, at, name)
    assert (got - slow).norm() < 2e-4 * want.norm()
    assert (got - want).norm() < 0.03 * want.norm()
    assert (want - unchanged).norm() > 0.06 * want.norm()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", WATCHED)
@pytest.mark.parametrize("change", [after, after_with_keywords, before, own_forward])
def test_changes_of_modules_are_seen(build, tokens, monkeypatch, change, at, when):
    if change is before and "layernorm" in at:
        change = after  # norms don't see the scale of what they read
    assert_seen(build, tokens, monkeypatch, change, when, at)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [everywhere, everywhere_before])
def test_hooks_on_all_modules_are_seen(build, tokens, monkeypatch, change, when):
    for at in ("mlp", "mlp.down_proj", "self_attn.o_proj"):
        assert_seen(build, tokens, monkeypatch, change, when, at)


@pytest.mark.parametrize("at", ["self_attn.q_norm", "post_attention_layernorm", "post_feedforward_layernorm"])
def test_changes_of_gemmas_modules_are_seen(build, tokens, monkeypatch, at):
    assert_seen(build, tokens, monkeypatch, after, "after", at, "gemma3")


class ScaledAttention(modeling_llama.LlamaAttention):
    def forward(self, *given, **words):
        return scaled(super().forward(*given, **words))


class ScaledMlp(modeling_llama.LlamaMLP):
    def forward(self, x):
        return scaled(super().forward(x))


def subclassed(module):
    module.__class__ = ScaledAttention if hasattr(module, "q_proj") else ScaledMlp


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["self_attn", "mlp"])
def test_subclasses_run(build, tokens, monkeypatch, at, when):
    assert_seen(build, tokens, monkeypatch, subclassed, when, at)


def layer_norms(layer):
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = nn.LayerNorm(32)
        norm.weight.copy_(getattr(layer, name).weight)
        norm.bias.fill_(0.3)
        setattr(layer, name, norm)


def other_activation(layer):
    layer.mlp.act_fn = nn.ReLU()


@pytest.mark.parametrize("change", [layer_norms, other_activation])
def test_replaced_children_run(build, tokens, monkeypatch, change):
    assert_seen(build, tokens, monkeypatch, change, "after", "")


def test_norms_replaced_before(build, tokens, monkeypatch):
    assert_seen(build, tokens, monkeypatch, layer_norms, "before", "")


def test_a_class_that_is_patched_later_runs_as_patched(build, tokens, monkeypatch):
    model, x = build("llama"), tokens(2, 14)
    real = modeling_llama.LlamaMLP.forward
    with prepare(model, STEADY) as prepared:
        before = decoded(model, x, prepared.cache())
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: scaled(real(self, x)))
        got = decoded(model, x, prepared.cache())
    assert (got - before).norm() > 0.1 * before.norm()
    want = decoded(model, x, DynamicCache(config=model.config))
    assert (got - want).norm() < 0.03 * want.norm()


def test_a_copied_model_watches_its_own_modules(build, tokens):
    model, x = build("llama"), tokens(2, 14)
    with prepare(model, STEADY) as prepared:
        want = decoded(model, x, prepared.cache())
        other = copy.deepcopy(model)
        handle = after(other.model.layers[1].mlp)
        assert torch.equal(decoded(model, x, prepared.cache()), want)
        assert not torch.allclose(decoded(other, x, prepared.cache()), want, rtol=1e-2)
        handle.remove()
        torch.testing.assert_close(decoded(other, x, prepared.cache()), want)


def test_a_linear_layer_whose_class_is_patched_later(build, tokens, monkeypatch):
    model, x = build("llama"), tokens(2, 14)
    real = nn.Linear.forward
    with prepare(model, STEADY) as prepared:
        before = decoded(model, x, prepared.cache())
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: scaled(real(self, x)))
        got = decoded(model, x, prepared.cache())
    assert (got - before).norm() > 0.1 * before.norm()
    want = decoded(model, x, DynamicCache(config=model.config))
    assert (got - want).norm() < 0.03 * want.norm()


def test_an_mlp_of_another_formula_is_refused(build, monkeypatch):
    real = modeling_llama.LlamaMLP.forward

    def forward(self, x):
        return real(self, x) * 1.01

    forward.__module__ = modeling_llama.__name__  # as if transformers had written it
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    with pytest.raises(ValueError, match="LlamaMLP computes something else than a gated MLP; leave both out"):
        prepare(build("llama"), STEADY)


def test_what_runs_in_full_precision_is_said(build, caplog):
    model = build("llama")
    own_forward(model.model.layers[1].self_attn.o_proj)
    subclassed(model.model.layers[0].mlp)
    with prepare(model, STEADY):
        pass
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in said] == [
        "model.layers.0.mlp",
        "model.layers.1.self_attn.o_proj",
    ]
    assert "since its ScaledMlp isn't torch's or transformers' own, or is watched" in said[0]
