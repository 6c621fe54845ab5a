"""bfloat16 and float16 models: computed in float32 on their own weights, and given back as they were."""

import copy
import logging

import pytest
import torch

import torchlamp
from torchlamp.huggingface import widening

pytestmark = pytest.mark.usefixtures("no_grad")
FAMILIES = ["llama", "qwen2", "gemma3", "gpt2"]
MIXED = "scores=ps4.center.sort+strict:0.1, mlp_up=ps6+running:0.01, lm_head=int8+running:0.001"


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request):
    return request.param


def narrow_and_wide(build, name, dtype):
    model = copy.deepcopy(build(name)).to(dtype)
    return model, copy.deepcopy(model).float()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("policy", ["ps3+all", MIXED])
def test_the_model_runs_as_its_float32_copy(build, tokens, name, dtype, policy):
    model, wide = narrow_and_wide(build, name, dtype)
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    ids = tokens(2, 11)
    with torchlamp.lookahead(wide, policy) as expected_statistics:
        expected = wide(ids).logits
    with torchlamp.lookahead(model, policy) as statistics:
        assert model.dtype == torch.float32
        assert torch.equal(model(ids).logits, expected)
    assert statistics.selected == expected_statistics.selected
    assert model.dtype == dtype
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluate_has_the_float32_reference(build, tokens, name, dtype):
    model, wide = narrow_and_wide(build, name, dtype)
    windows = tokens(2, 16)
    assert torchlamp.evaluate(model, windows, "fp32+none", baselines=False).kl_mean < 1e-9
    found, expected = (torchlamp.evaluate(m, windows, "ps4+strict:0.1") for m in (model, wide))
    assert found.kl_mean == expected.kl_mean
    assert found.reference_perplexity == expected.reference_perplexity
    assert model.dtype == dtype


def test_after_an_exception_nested_and_in_inference_mode(build, tokens, dtype):
    model, wide = narrow_and_wide(build, "llama", dtype)
    ids = tokens(1, 9)
    with pytest.raises(KeyError), torchlamp.lookahead(model, "ps4"):
        raise KeyError
    assert model.dtype == dtype
    with torchlamp.lookahead(wide, "ps4"):
        expected = wide(ids).logits
    with torch.inference_mode(), torchlamp.lookahead(model, "ps2"), torchlamp.lookahead(model, "ps4"):
        assert torch.equal(model(ids).logits, expected)
    assert model.dtype == dtype
    assert model(ids).logits.dtype == dtype


def test_tied_weights_stay_tied(build, dtype):
    model, _ = narrow_and_wide(build, "gpt2", dtype)
    assert model.lm_head.weight is model.transformer.wte.weight
    with torchlamp.lookahead(model, "ps4"):
        assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight is model.transformer.wte.weight


def test_attach_until_detach(build, tokens, dtype):
    model, wide = narrow_and_wide(build, "llama", dtype)
    ids = tokens(1, 9)
    torchlamp.attach(wide, "mlp_up=ps4")
    torchlamp.attach(model, "mlp_up=ps2")
    torchlamp.attach(model, "mlp_up=ps4")
    assert torch.equal(model(ids).logits, wide(ids).logits)
    torchlamp.detach(model)
    assert model.dtype == dtype
    with pytest.raises(ValueError, match="unknown site"):
        torchlamp.attach(model, "mlp=ps4")
    assert model.dtype == dtype


def test_it_is_said_once(build, dtype, caplog):
    widening._MENTIONED.clear()
    model, _ = narrow_and_wide(build, "llama", dtype)
    with caplog.at_level(logging.INFO, "torchlamp.widening"):
        for _ in range(2):
            with torchlamp.lookahead(model, "ps4"):
                pass
    assert len(caplog.records) == 1
    assert "computed in float32" in caplog.text


@pytest.mark.parametrize("run", [torchlamp.attach, lambda *given: torchlamp.lookahead(*given).__enter__()])
def test_what_is_no_module_is_refused_in_words(run):
    with pytest.raises(TypeError, match="str is no transformers model"):
        run("gpt2", "ps4+none")


def test_full_memory_leaves_the_weights_as_they_were(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).bfloat16()
    wide, calls = torch.Tensor.float, []

    def until_full(tensor):
        calls.append(tensor)
        if len(calls) == 3:
            raise MemoryError
        return wide(tensor)

    monkeypatch.setattr(torch.Tensor, "float", until_full)
    with pytest.raises(MemoryError):
        widening.widened(model).__enter__()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
