"""Copies that were kept: the same numbers, and no weight is read for them; a prepared model's own weights."""

import copy
import pickle

import pytest
import torch
from decoding_models import GUARDED, decoded, generated, is_untouched

from torchlamp.decoding.head import LowBitHead
from torchlamp.decoding.mlp import LowBitMlp
from torchlamp.huggingface import decode_forwards
from torchlamp.huggingface.copies import Copies
from torchlamp.huggingface.prepare import DEFAULT, prepare, prepare_from, prepared
from torchlamp.kernels.low_bit_matrix import LowBitMatrix

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "policy"), [(n, p) for n in ("llama", "qwen2", "gemma3") for p in (GUARDED, None)]
)
def test_kept_copies_give_the_same_numbers_and_nothing_is_packed(
    build, tokens, monkeypatch, name, policy, dtype
):
    model, x = build(name).to(dtype), tokens(2, 16)
    made = Copies()
    prepare_from(made, model, policy)
    want, memory = decoded(model, x, prepared(model).cache()), str(prepared(model).memory)
    prepared(model).undo()
    for kind in (LowBitMatrix, LowBitMlp, LowBitHead):
        monkeypatch.setattr(kind, "pack", None)
    monkeypatch.setattr(decode_forwards, "_check_formula", None)
    kept = Copies(made.tensors)
    prepare_from(kept, model, policy)
    assert torch.equal(decoded(model, x, prepared(model).cache()), want)
    assert str(prepared(model).memory) == memory
    assert not kept.tensors
    prepared(model).undo()
    assert is_untouched(model)


def test_copies_of_another_model_or_policy_are_refused(build):
    model, made = build("llama"), Copies()
    prepare_from(made, model, GUARDED).undo()
    for policy, said in ((GUARDED.replace("qkv=int12", "qkv=int8"), "codes"), ("qkv=int4", "codes")):
        with pytest.raises(ValueError, match=f"a kept low-bit copy has .* as its {said} in the place of"):
            prepare_from(Copies(made.tensors), model, policy)
    some = {name: tensor for name, tensor in made.tensors.items() if not name.startswith("layer 1 mlp")}
    with pytest.raises(ValueError, match="no low-bit copy 'layer 1 mlp' among those that were kept"):
        prepare_from(Copies(some), model, GUARDED)
    assert is_untouched(model)


def test_prepared_finds_what_prepare_returned(build, tokens):
    model = build("llama")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM isn't prepared: call torchlamp\.prepare"):
        prepared(model)
    with prepare(model, "qkv=int8") as own:
        assert prepared(model) is own
        with pytest.raises(ValueError, match=r"call undo\(\) .* or torchlamp\.prepared\(model\)\.undo\(\)"):
            prepare(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert prepared(other).model is other
            prepared(other).undo()
            assert is_untouched(other)
        assert prepared(model) is own
    assert is_untouched(model)
    for policy in (DEFAULT, "default"):
        with prepare(model, policy) as own:
            assert own.asked == own.policy


def test_changed_weights_are_noticed(build, tokens):
    model, x = build("llama"), tokens(1, 8)
    with prepare(model, GUARDED) as own:
        generated(model, x)
        other = copy.deepcopy(model)
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        for call in (own.cache, lambda: generated(model, x)):
            with pytest.raises(ValueError, match=r"changed after prepare \(model.layers.1.mlp.up_proj\)"):
                call()
        generated(other, x)
        other.load_state_dict(model.state_dict())
        with pytest.raises(ValueError, match="weights were changed after prepare"):
            generated(other, x)
    with prepare(model, GUARDED):
        generated(model, x)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_save_pretrained_writes_the_models_own_weights(build, tmp_path, name, dtype):
    """In their own dtype and bit for bit, whatever is widened while the model is prepared."""
    model = build(name).to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    policy = "qkv=int8" if name == "gpt2" else None
    with prepare(model, policy):
        model.save_pretrained(tmp_path / name)
        during = {**model.state_dict(), **{f"model.{k}": t for k, t in model.base_model.state_dict().items()}}
    saved = type(model).from_pretrained(tmp_path / name, dtype="auto")
    assert is_untouched(saved, saved.config._attn_implementation)
    for state in (saved.state_dict(), during, model.state_dict()):
        for key, tensor in before.items():
            assert state[key].dtype == tensor.dtype == dtype, key
            assert torch.equal(state[key], tensor), key
    assert not any(module._state_dict_hooks for module in model.modules())
