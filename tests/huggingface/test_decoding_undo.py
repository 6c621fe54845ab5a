import copy
import pickle

import pytest
import torch
from decoding_models import GUARDED, LINEAR, WHOLE, decoded, generated, is_untouched
from torch import nn
from transformers import DynamicCache

import torchlamp
from torchlamp.huggingface.decode_attention import NAME
from torchlamp.huggingface.decode_plan import DecodePlan
from torchlamp.huggingface.prepare import prepare
from torchlamp.huggingface.site_forwards import Forward

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", WHOLE)
def test_undo_gives_back_the_same_model(build, tokens, name):
    model, x = build(name), tokens(2, 12)
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    implementation = model.config._attn_implementation
    state = {key: value.clone() for key, value in model.state_dict().items()}
    want, text = model(x).logits, generated(model, x)
    prepared = prepare(model, GUARDED)
    assert not torch.equal(decoded(model, x, prepared.cache()), want[:, 9:])
    assert generated(model, x).shape == text.shape
    prepared.undo()
    assert is_untouched(model, implementation)
    prepared.undo()
    assert torch.equal(model(x).logits, want)
    assert torch.equal(generated(model, x), text)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_with_block_undoes_even_after_an_error(build, tokens):
    model = build("llama")
    with prepare(model, GUARDED) as prepared:
        assert prepared.model is model
        assert model.config._attn_implementation == NAME
    with pytest.raises(ZeroDivisionError), prepare(model, GUARDED):
        1 / 0  # noqa: B018
    assert is_untouched(model)


def test_other_tools_replacements_stay(build, tokens):
    model, calls = build("llama"), []
    head, own = model.lm_head, model.lm_head.forward
    cache = model._prepare_cache_for_generation
    model._prepare_cache_for_generation = lambda *a, **k: (calls.append("cache"), cache(*a, **k))[1]
    theirs = model._prepare_cache_for_generation
    head.forward = lambda x: (calls.append("head"), own(x))[1]
    replaced = head.forward
    with prepare(model, GUARDED):
        generated(model, tokens(1, 5))
        assert calls == ["cache"] + ["head"] * 12  # a forward that somebody has replaced goes on running
        model(tokens(1, 5))
        assert len(calls) == 14
    assert head.forward is replaced
    assert model._prepare_cache_for_generation is theirs


@pytest.mark.parametrize("policy", ["qkv=int8", "scores=int8, values=int8", GUARDED])
def test_a_model_is_prepared_once_at_a_time(build, policy):
    model = build("llama")
    with prepare(model, policy), pytest.raises(ValueError, match=r"is prepared for low-bit decoding already"):
        prepare(model, "lm_head=int8")
    assert is_untouched(model)
    for simulated in ("ps4+strict:0.1", "qkv=ps4+none"):
        with torchlamp.lookahead(model, simulated), pytest.raises(ValueError, match="under a policy already"):
            prepare(model, policy)


def test_a_deep_copy_is_prepared_on_its_own(build, tokens):
    model, x = build("llama"), tokens(2, 9)
    prepared = prepare(model, GUARDED)
    want = generated(model, x)
    other = copy.deepcopy(model)
    forwards = [vars(m)["forward"] for m in other.modules() if "forward" in vars(m)]
    own = {id(module) for module in other.modules()}
    assert forwards
    assert all(isinstance(forward, Forward) and id(forward.module) in own for forward in forwards)
    assert torch.equal(generated(other, x), want)
    prepared.undo()
    assert is_untouched(model)
    assert torch.equal(generated(other, x), want)


def test_memory_is_said_up_front(build):
    model = build("llama")
    with prepare(model, "qkv=int8, lm_head=int8") as prepared:
        # 64 and 61 rows of 32 codes and a scale; blocks are whole.
        assert prepared.memory.low_bit == (2 * 64 + 64) * (32 + 2)
        assert prepared.memory.extra_full == 0
        assert prepared.memory.full == sum(p.nbytes for p in set(model.parameters()))
        assert "MB more" in str(prepared.memory)
    with prepare(model, LINEAR) as prepared:
        assert prepared.memory.extra_full == 0  # no rule reads columns of the down projections
    with prepare(model, GUARDED) as prepared:
        assert prepared.memory.extra_full == 2 * 48 * 32 * 2


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda m: m.double(), TypeError, "torch.float64"),
        (
            lambda m: m.to("meta"),
            ValueError,
            "the model is on meta: low-bit decoding has kernels for the CPU",
        ),
        (lambda m: nn.Linear(3, 3), TypeError, "Linear is no transformers model"),
    ],
)
@pytest.mark.parametrize("policy", [LINEAR, "scores=int8, values=int8"])
def test_models_that_are_refused(build, change, error, said, policy):
    with pytest.raises(error) as raised:
        prepare(change(build("llama")), policy)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("policy", "options", "said"),
    [
        ("qkv=int5", {}, "operand 'int5' at site qkv"),
        (LINEAR, {"top": 0}, "top=0: give at least 1"),
        (GUARDED, {"full": "float8"}, "full='float8': allowed are float16 and float32"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(build, policy, options, said):
    model = build("llama")
    with pytest.raises(ValueError) as raised:
        prepare(model, policy, **options)
    assert said in str(raised.value)
    assert is_untouched(model)
    with (
        prepare(model, LINEAR) as prepared,
        pytest.raises(ValueError, match="leaves out scores and values: use transformers' DynamicCache"),
    ):
        prepared.cache()


def test_an_error_on_the_way_leaves_the_model_as_it_was(build, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(DecodePlan, "_use_cache", lambda plan, cache: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(model, GUARDED)
    assert is_untouched(model)


def test_autocast_and_gradients_are_refused(build, tokens):
    model, x = build("llama"), tokens(1, 1)
    with prepare(model, LINEAR):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="under autocast"):
            model(x, past_key_values=DynamicCache(config=model.config))
        with torch.enable_grad():
            loss = model(x, past_key_values=DynamicCache(config=model.config)).logits.sum()
            with pytest.raises(RuntimeError, match="no gradient flows through look-ahead"):
                loss.backward()


@pytest.mark.parametrize(
    "policy", ["scores=int8+all, values=int8+all", "mlp_up=int8, mlp_down=int8", "lm_head=int8"]
)
def test_a_simulated_policy_on_a_prepared_model_is_refused_and_takes_nothing_away(build, tokens, policy):
    model, x = build("llama"), tokens(1, 5)
    with prepare(model, policy):
        before = [vars(module).get("forward") for module in model.modules()]
        implementation = model.config._attn_implementation
        with pytest.raises(ValueError, match=r"is prepared for low-bit decoding.*call undo\(\)"):
            torchlamp.attach(model, "mlp_up=ps4+none")
        with (
            pytest.raises(ValueError, match="is prepared for low-bit decoding"),
            torchlamp.lookahead(model, "ps4+none"),
        ):
            pass
        torchlamp.detach(model)
        assert [vars(module).get("forward") for module in model.modules()] == before
        assert model.config._attn_implementation == implementation
    with torchlamp.lookahead(model, "ps4+none") as statistics:
        model(x)
    assert statistics.eligible > 0


@pytest.mark.parametrize("policy", [GUARDED, None])
def test_a_prepared_model_can_be_pickled(build, tokens, policy):
    model, x = build("llama"), tokens(2, 9)
    with prepare(model, policy) as prepared:
        want = generated(model, x)
        once = pickle.loads(pickle.dumps(model))
        other = pickle.loads(pickle.dumps(prepared))
        seen = prepared.statistics.eligible
        assert torch.equal(generated(once, x), want)
        assert torch.equal(generated(other.model, x), want)
        assert prepared.statistics.eligible == seen > 0
    other.undo()
    assert is_untouched(other.model)


@pytest.mark.parametrize("length", [1, 5])
def test_attention_weights_are_refused(build, tokens, length):
    """There are none to give: an empty tuple would look like a model without attention."""
    model = build("llama")
    with prepare(model, GUARDED) as prepared:
        cache = prepared.cache()
        model(tokens(1, 4), past_key_values=cache)
        with pytest.raises(
            ValueError, match="output_attentions=True: the attention 'lamp-decode' doesn't return"
        ):
            model(tokens(1, length), past_key_values=cache, output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions"):
            model.config.output_attentions = True
