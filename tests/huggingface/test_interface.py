"""What of us is in a model already: refused with the calls that end it."""

import copy

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import torchlamp
from torchlamp.bench.decoders import dynamic_int8
from torchlamp.huggingface.interface import uses_interface


@pytest.mark.parametrize("policy", ["ps4+strict:0.1", "mlp_up=ps4+none"])
@pytest.mark.parametrize("runs", [True, False])
def test_an_attached_policy_is_ended_by_the_calls_of_the_message(build, policy, runs):
    model = build("llama")
    torchlamp.attach(model, policy)
    if runs:
        model.set_attn_implementation("lamp")
    with pytest.raises(ValueError, match=r"under a policy already.*torchlamp\.detach\(model\)") as error:
        torchlamp.prepare(model)
    assert ("model.set_attn_implementation('sdpa')" in str(error.value)) == runs
    torchlamp.detach(model)
    if runs:
        with pytest.raises(
            ValueError, match=r"names the attention 'lamp'.*set_attn_implementation\('sdpa'\)"
        ):
            torchlamp.prepare(model)
        model.set_attn_implementation("sdpa")
    torchlamp.prepare(model).undo()


def test_a_prepared_model_is_ended_by_the_call_of_the_message(build):
    model = build("llama")
    prepared = torchlamp.prepare(model)
    for call in (torchlamp.prepare, lambda model: torchlamp.attach(model, "ps4+none")):
        with pytest.raises(ValueError, match=r"prepared for low-bit decoding already: call undo\(\) of what"):
            call(model)
    prepared.undo()
    torchlamp.prepare(model).undo()


@pytest.mark.parametrize("first", ["prepare", "attach"])
def test_another_model_of_the_same_config_object_is_told_what_it_shares(build, first):
    model = build("llama")
    if first == "prepare":
        undo = torchlamp.prepare(model).undo
    else:
        torchlamp.attach(model, "ps4+none")
        model.set_attn_implementation("lamp")
        undo = None
    fresh = type(model)(model.config)
    with pytest.raises(ValueError, match=r"nothing of this model was replaced.*copy\.deepcopy\(config\)"):
        torchlamp.prepare(fresh)
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    torchlamp.prepare(type(model)(config)).undo()
    if undo is not None:
        undo()
        torchlamp.prepare(fresh).undo()


def test_a_prepared_model_prints_as_one_line(build):
    with torchlamp.prepare(build("llama"), "qkv=int8, lm_head=int8") as prepared:
        said = repr(prepared)
    assert said.startswith("<Prepared LlamaForCausalLM under 'qkv=int8, lm_head=int8': weights ")
    assert "\n" not in said
    assert len(said) < 250


def mamba():
    return MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()


def test_a_model_without_the_interface_is_refused_in_words():
    model = mamba()
    assert not uses_interface(model)
    for call in (
        lambda: torchlamp.prepare(model),
        lambda: torchlamp.prepare(model, "scores=int8.center, values=int8"),
        lambda: torchlamp.prepare(model, "qkv=int8"),
        lambda: torchlamp.evaluate(model, torch.zeros(1, 4, dtype=torch.int64), "ps4+none"),
        lambda: torchlamp.attach(model, "ps4+none"),
    ):
        with pytest.raises(
            ValueError, match="MambaForCausalLM doesn't use transformers' attention interface"
        ):
            call()


def test_what_can_run_is_said_truly():
    """That `scores` can only where it can; a mixture of experts and a quantised layer by their names."""
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    own_linear = r"query_key_value is a [\w.]*FalconLinear: only torch"
    for model, said in ((falcon, own_linear), (mamba(), "nor can `scores`: it has no attention interface")):
        with pytest.raises(ValueError, match=said):
            torchlamp.attach(model, "qkv=ps4+none")
        with pytest.raises(ValueError, match="doesn't use transformers' attention interface"):
            torchlamp.attach(model, "ps4+none")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=32, **sizes, **heads)).eval()
    said = r"layers\.0\.mlp \(MixtralSparseMoeBlock\) is a mixture of experts.*the other sites can run"
    with pytest.raises(ValueError, match=said):
        torchlamp.attach(mixtral, "mlp_up=ps4+none")
    torchlamp.attach(mixtral, "ps4+none, qkv=ps7+none")


def test_a_quantised_layer_is_named_in_full(build):
    model = dynamic_int8(build("llama"))
    with pytest.raises(
        ValueError, match=r"q_proj is a torch\.ao\.nn\.quantized\.dynamic\.[\w.]*Linear: only torch"
    ):
        torchlamp.attach(model, "qkv=ps4+none")
