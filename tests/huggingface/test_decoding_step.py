"""Prompts and steps through a whole decoder: when they run in native calls, and that nobody can tell."""

import copy

import pytest
import torch
from decoding_models import GUARDED, STEADY, WHOLE, decoded, generated, left_padding
from transformers import DynamicCache

from torchlamp.huggingface import decode_plan
from torchlamp.huggingface.decode_layer import NativeLayer, norm_formula
from torchlamp.huggingface.decode_step import StepDecode
from torchlamp.huggingface.prepare import prepare
from torchlamp.kernels import native

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.skipif(not native.available(), reason="layers are fused by the native kernels alone"),
]
NATIVE = WHOLE[:5]


@pytest.fixture
def calls(monkeypatch):
    """Numbers of the layers that ran natively."""
    made, kernel = [], NativeLayer.kernel
    monkeypatch.setattr(
        NativeLayer, "kernel", lambda self, isa: made.append(self.number) or kernel(self, isa)
    )
    return made


def prompted(model, prepared, x, prompt=9):
    cache = prepared.cache()
    model(x[:, :prompt], past_key_values=cache)
    return cache


def assert_near(got, want, bound=2e-4):
    assert (got - want).norm() < bound * want.norm()


@pytest.mark.parametrize("name", NATIVE)
def test_generate_runs_every_step_natively(build, tokens, calls, name):
    model, x = build(name), tokens(2, 7)
    with prepare(model, GUARDED):
        generated(model, x, 12)
    assert calls == [0, 1] * 12


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", [STEADY, GUARDED])
@pytest.mark.parametrize("name", NATIVE)
def test_steps_of_any_length_are_their_tokens(build, tokens, calls, name, policy, padded):
    """Also past a sliding window and the store's first memory; the first part is the prompt."""
    model, x = build(name), tokens(3, 90)
    mask = left_padding(3, 90) if padded else torch.ones_like(x)
    with prepare(model, policy) as prepared:
        want = decoded(model, x, prepared.cache(), mask=mask)
        prepared.statistics.reset()
        ends, cache, parts = [9, 11, 15, 16, 48, 80, 90], prepared.cache(), []
        for start, end in zip([0, *ends], ends, strict=False):
            words = {"attention_mask": mask[:, :end], "past_key_values": cache}
            parts.append(model(x[:, start:end], **words).logits)
        counts = prepared.statistics
    got = torch.cat(parts[1:], 1)
    assert_near(got, want, 2e-4 if policy == STEADY else 5e-3)
    assert calls == [0, 1] * (82 + 7)
    assert counts.eligible_by_site["scores"] > 0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_after_hidden_states_is_native_again(build, tokens, calls, name):
    model, x = build(name), tokens(2, 14)
    with prepare(model, STEADY) as prepared:
        want = decoded(model, x, prepared.cache())
        assert calls == [0, 1] * 6  # the prompt's, too
        cache = prompted(model, prepared, x)
        out = model(x[:, 9:10], past_key_values=cache, output_hidden_states=True)
        assert calls == [0, 1] * 7
        assert len(out.hidden_states) == 3
        assert_near(out.logits[:, 0], want[:, 0])
        last = model.lm_head(model.model(x[:, 10:11], past_key_values=cache).last_hidden_state)
        assert calls == [0, 1] * 8  # transformers' hooks stay, and collect nothing
        assert_near(model(x[:, 11:12], past_key_values=cache).logits[:, 0], want[:, 2])
        if getattr(model.config, "final_logit_softcapping", None) is None:
            assert_near(last[:, 0], want[:, 1])


@pytest.mark.parametrize("at", ["model", "model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"])
def test_hooks_around_the_layers_run(build, tokens, calls, at):
    def double(module, given, result):
        return result * 1.5 if isinstance(result, torch.Tensor) else None

    model, x, seen = build("llama"), tokens(2, 14), []
    with prepare(model, STEADY) as prepared:
        module = model.get_submodule(at)
        handles = [
            module.register_forward_hook(lambda module, given, result: seen.append(result)),
            module.register_forward_hook(double),
        ]
        got = decoded(model, x, prepared.cache())
        for handle in handles:
            handle.remove()
    assert len(seen) == 6
    assert calls == ([] if at == "model.norm" else [0, 1] * 6)
    handle = model.get_submodule(at).register_forward_hook(double)
    want = decoded(model, x, DynamicCache(config=model.config))
    handle.remove()
    assert_near(got, want, 0.03)


@pytest.mark.parametrize("name", NATIVE)
def test_results_have_the_models_form(build, tokens, calls, name):
    model, x = build(name), tokens(2, 10)
    with prepare(model, STEADY) as prepared:
        for words in ({}, {"use_cache": False}, {"use_cache": True}, {"return_dict": False}):
            cache, other = prompted(model, prepared, x), DynamicCache(config=model.config)
            got = model.model(x[:, 9:10], past_key_values=cache, **words)
            want = model.model(x[:, 9:10], past_key_values=other, **words)
            assert type(got) is type(want)
            if words != {"return_dict": False}:
                assert (got.past_key_values is cache) == (want.past_key_values is other)
                assert got.keys() == want.keys()
    assert calls == [0, 1] * 7


def test_embeddings_and_positions_may_be_given(build, tokens, calls):
    model, x = build("llama"), tokens(2, 14)
    with prepare(model, STEADY) as prepared:
        want = decoded(model, x, prepared.cache())
        cache = prompted(model, prepared, x)
        embedded = model.model.embed_tokens(x[:, 9:10])
        got = model(inputs_embeds=embedded, past_key_values=cache, position_ids=torch.full((2, 1), 9)).logits
        assert torch.equal(got[:, 0], want[:, 0])
        assert len(calls) == 16
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(x[:, :1], inputs_embeds=embedded, past_key_values=cache)


def test_what_steps_are_not(build, tokens, calls):
    model, x = build("llama"), tokens(2, 14)
    with prepare(model, STEADY) as prepared:
        want = decoded(model, x, prepared.cache())[:, 0]
        del calls[:]
        model(x[:, :1])
        model(x[:, :1], past_key_values=prepared.cache())  # an empty cache
        for words in ({"output_hidden_states": True}, {"something": 3}):
            cache = prompted(model, prepared, x)
            del calls[:]
            assert_near(model(x[:, 9:10], past_key_values=cache, **words).logits[:, 0], want)
            assert calls == []
        cache = prompted(model, prepared, x)
        del calls[:]
        with torch.enable_grad():
            assert_near(model(x[:, 9:10], past_key_values=cache).logits[:, 0], want)
        model.set_attn_implementation("sdpa")
        cache = prompted(model, prepared, x)
        assert_near(model(x[:, 9:10], past_key_values=cache).logits[:, 0], want, 0.03)
    assert calls == []


def test_a_decoder_of_another_class_runs_its_modules(build, tokens, calls):
    class Between(type(build("llama").model)):
        def forward(self, *given, **words):
            result = super().forward(*given, **words)
            result.last_hidden_state = -result.last_hidden_state
            return result

    model, x = build("llama"), tokens(2, 14)
    with prepare(model, STEADY) as prepared:
        want = decoded(model, x, prepared.cache())
        del calls[:]
    model.model.__class__ = Between
    with prepare(model, STEADY) as prepared:
        assert not any(isinstance(vars(m).get("forward"), StepDecode) for m in model.modules())
        assert_near(decoded(model, x, prepared.cache()), -want)
    assert calls == []


def test_early_exit_leaves_the_last_layers_out(build, tokens, monkeypatch):
    model, x = build("llama"), tokens(2, 14)

    def logits():
        with prepare(model, STEADY) as prepared:
            return decoded(model, x, prepared.cache())

    both = logits()
    model.config.num_hidden_layers = 1
    got = logits()
    monkeypatch.setattr(decode_plan, "can_fuse", lambda layer, rows: False)
    want = logits()
    assert (got - want).norm() < 2e-4 * want.norm() < 0.1 * (both - want).norm()


@pytest.mark.parametrize("padded", [False, True])
def test_a_sliding_window_and_growing_memory(build, tokens, monkeypatch, padded):
    model, x = build("mistral"), tokens(2, 150)
    model.config.sliding_window = 6
    mask = left_padding(2, 150) if padded else None
    with prepare(model, STEADY) as prepared:
        cache = prepared.cache()
        for layer in cache.layers:
            layer.slack = 16
        got = decoded(model, x, cache, mask=mask)
        assert cache.layers[0].dropped > 100
    want = decoded(model, x, DynamicCache(config=model.config), mask=mask)
    monkeypatch.setattr(decode_plan, "can_fuse", lambda layer, rows: False)
    with prepare(model, STEADY) as prepared:
        slow = decoded(model, x, prepared.cache(), mask=mask)
    assert_near(got, slow, 1e-3)
    assert_near(got, want, 0.03)


def test_caches_of_two_models_keep_apart(build, tokens):
    model, x = build("llama"), tokens(2, 14)
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.mul_(-1)
    with prepare(model, STEADY) as first, prepare(other, STEADY) as second:
        want = decoded(model, x, first.cache()), decoded(other, x, second.cache())
        caches = prompted(model, first, x), prompted(other, second, x)
        for t in range(9, 14):
            for one, cache, right in zip((model, other), caches, want, strict=True):
                got = one(x[:, t : t + 1], past_key_values=cache).logits
                assert torch.equal(got[:, 0], right[:, t - 9])


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("size", [1, 7, 32, 100])
def test_the_native_norm_is_the_models(build, name, size):
    module = type(build(name).model.norm)(size, eps=1e-3)
    module.weight.copy_(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(2))
    weight, eps = norm_formula(module, name)
    y, same = torch.empty(3, size), x.clone()
    for given, out in ((x, y), (same, same)):
        native.extension().rms_norm(native.instruction_set(), given, weight, eps, out)
        torch.testing.assert_close(out, module(x), rtol=1e-5, atol=1e-6)
    for wrong in ((x, weight[1:], eps, y), (x, weight, eps, y[:2])):
        if size > 1:
            with pytest.raises(ValueError, match="must be contiguous"):
                native.extension().rms_norm(native.instruction_set(), *wrong)
