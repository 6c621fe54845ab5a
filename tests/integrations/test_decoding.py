"""A prepared model: what it computes, and that undoing gives back the model as it was."""

import copy

import pytest
import torch
from transformers import DynamicCache

from torchlamp.integrations.decode_layer import LayerDecode, can_fuse
from torchlamp.integrations.decoding import DEFAULT, prepare
from torchlamp.kernels.lowbit import LowBitMatrix

pytestmark = pytest.mark.usefixtures("no_grad")
FULL_LAYERS = "scores=int8+all, values=int8+all, qkv=int12, attention_out=int12, mlp_up=int12, mlp_down=int12"


def state(model):
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return forwards, model.config._attn_implementation, vars(model).get("_prepare_cache_for_generation")


def decode(model, cache, tokens, prefill=6):
    logits = [model(tokens[:, :prefill], past_key_values=cache, use_cache=True).logits[:, -1:]]
    logits += [
        model(token, past_key_values=cache, use_cache=True).logits
        for token in tokens[:, prefill:].split(1, 1)
    ]
    return torch.cat(logits, 1)


def test_undo_gives_everything_back(model):
    before = state(model)
    prepared = prepare(model)
    assert state(model) != before
    prepared.undo()
    assert state(model) == before
    prepared.undo()
    with pytest.raises(KeyError), prepare(model):
        raise KeyError
    assert state(model) == before


def test_prompts_are_full_precision(model, tokens):
    ids = tokens(2, 12)
    reference = model(ids).logits
    with prepare(model, "qkv=int4, attention_out=int4"):
        torch.testing.assert_close(model(ids).logits, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_whole_layers_equal_their_modules(build, tokens, monkeypatch, name, batch):
    model, ids = build(name), tokens(batch, 30)
    assert can_fuse(model.model.layers[0])
    with prepare(model, FULL_LAYERS, full="float32") as prepared:
        assert any(isinstance(vars(m).get("forward"), LayerDecode) for m in model.modules())
        fused = decode(model, prepared.cache(), ids)
        monkeypatch.setattr(
            "torchlamp.integrations.lookahead_cache.LookaheadLayer.has_room", lambda self: False
        )
        single = decode(model, prepared.cache(), ids)
    torch.testing.assert_close(fused, single, rtol=1e-3, atol=1e-3)
    reference = decode(model, DynamicCache(config=model.config), ids)
    assert (fused - reference).norm() < 0.02 * reference.norm()


def test_whole_layers_with_padding(build, tokens):
    model, ids = build("llama"), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    reference = model.generate(ids, output_logits=True, **settings)
    with prepare(model, FULL_LAYERS, full="float32"):
        found = model.generate(ids, output_logits=True, **settings)
    torch.testing.assert_close(found.logits[1], reference.logits[1], rtol=0.05, atol=0.05)


def test_linear_layers_are_their_copies(llama, tokens):
    ids = tokens(1, 12)
    dequantised = copy.deepcopy(llama)
    for layer in dequantised.model.layers:
        linear = layer.self_attn.o_proj
        linear.weight.copy_(LowBitMatrix.pack(linear.weight, 8).dequantised())
    with prepare(llama, "attention_out=int8"):
        found = decode(llama, DynamicCache(), ids, prefill=1)
    expected = decode(dequantised, DynamicCache(), ids, prefill=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_greedy_head_is_exact(model, tokens):
    ids = tokens(2, 9)
    settings = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    reference = model.generate(ids, **settings)
    with prepare(model, "lm_head=int4") as prepared:
        assert torch.equal(model.generate(ids, **settings), reference)
    assert 0 < prepared.statistics.recompute_rates["lm_head"] <= 1


def test_default_leaves_out_what_cannot_be(build, caplog):
    with prepare(build("gpt2")) as prepared:
        assert "mlp_up" not in prepared.policy.sites
        assert "qkv" in prepared.policy.sites
    assert "gated MLPs" in caplog.text
    with prepare(build("llama")) as prepared:
        assert str(prepared.policy) == str(prepared.policy.parse(DEFAULT))


def test_memory_is_said(llama):
    with prepare(llama) as prepared:
        memory = prepared.memory
    assert memory.full == sum(p.numel() * 4 for p in set(llama.parameters()))
    assert 0.2 < memory.low_bit / memory.full < 1
    assert "MB" in str(memory)


def test_a_deep_copy_is_prepared_too(llama, tokens):
    ids = tokens(1, 10)
    with prepare(llama, "qkv=int12, attention_out=int12"):
        copied = copy.deepcopy(llama)
        expected = decode(llama, DynamicCache(), ids)
    torch.testing.assert_close(decode(copied, DynamicCache(), ids), expected)


def test_refuses(build):
    model = build("llama")
    with pytest.raises(TypeError, match="no transformers model"):
        prepare(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="top=0"):
        prepare(model, top=0)
    with prepare(model), pytest.raises(ValueError, match="already"):
        prepare(model)
    with pytest.raises(ValueError, match="leaves out scores"):
        prepare(model, "qkv=int8").cache()
    with pytest.raises(TypeError, match="float16"):
        prepare(build("llama").half(), "qkv=int8")
    with pytest.raises(ValueError, match="gated MLPs"):
        prepare(build("gpt2"), "mlp_up=int8, mlp_down=int8")
    with pytest.raises(ValueError, match="CPU"):
        prepare(build("llama").to("meta"))
