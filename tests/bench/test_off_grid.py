import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from torchlamp.bench.off_grid import off_grid, perplexities
from torchlamp.models import conversion

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
WINDOWS = torch.arange(96)[torch.randperm(96, generator=torch.Generator().manual_seed(1))].view(3, 32)


def on_grid(model):
    """Weights of 16 values in every group of 32, and norms that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.dim() == 2:
                groups = parameter.view(-1, 32)
                step = groups.abs().amax(-1, keepdim=True) / 7.5
                groups.copy_(((groups / step).floor() + 0.5) * step)
            else:
                parameter.normal_(0, 0.3)
    return model.eval()


def llama(**other):
    torch.manual_seed(0)
    return on_grid(LlamaForCausalLM(LlamaConfig(**SIZES, **other)))


def gemma():
    torch.manual_seed(0)
    return on_grid(Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=16)))


@torch.inference_mode()
def log_probabilities(model):
    return model(WINDOWS).logits.double().log_softmax(-1)


def kl(reference, tested):
    return (reference.exp() * (reference - tested)).sum(-1).mean().item()


def grid_points(weight):
    """Mean number of different values in a group of 32."""
    return sum(len(group.unique()) for group in weight.view(-1, 32)) / (weight.numel() // 32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_rotation_leaves_the_function(tied, bias):
    model = llama(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    before = log_probabilities(model)
    assert off_grid(model) is model
    assert kl(before, log_probabilities(model)) < 1e-9
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("make", [llama, gemma])
def test_no_weight_stays_on_its_grid(make):
    model = make()
    assert grid_points(model.model.layers[1].mlp.up_proj.weight) < 17
    off_grid(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert grid_points(parameter.detach()) > 30, name


@pytest.mark.parametrize("make", [llama, gemma])
def test_seed_decides(make):
    first, again, other = (off_grid(make(), seed).lm_head.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rotated_model_is_saved_and_loaded(tmp_path):
    model = off_grid(llama(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(log_probabilities(again), log_probabilities(model))


def test_rotated_model_goes_through_the_cache(tmp_path, tiny):
    model = off_grid(llama(tie_word_embeddings=True))
    conversion.save(model, tiny[1], tmp_path)
    assert torch.equal(log_probabilities(conversion.read(tmp_path)[0]), log_probabilities(model))


def test_noise_is_half_a_step_and_keeps_the_tie():
    model, moved = gemma(), off_grid(gemma())
    before, after = model.model.layers[0].mlp.up_proj.weight, moved.model.layers[0].mlp.up_proj.weight
    groups = before.view(-1, 32)
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    noise = (after.view(-1, 32) - groups) / step
    assert noise.abs().max() <= 0.2501
    assert noise.std().item() == pytest.approx(0.5 / 12**0.5, rel=0.02)
    assert moved.lm_head.weight is moved.model.embed_tokens.weight
    changed = (moved.lm_head.weight - model.lm_head.weight).view(-1, 32) / step.mean()
    assert 0.1 < changed.std() < 0.2  # once, not twice


def test_noisy_model_predicts_about_as_well():
    before, after = perplexities(gemma(), WINDOWS)
    assert before != after
    assert after == pytest.approx(before, rel=0.1)


def test_perplexities_of_a_rotated_model_are_one():
    model = llama()
    with torch.inference_mode():
        expected = torch.stack([model(w[None], labels=w[None]).loss for w in WINDOWS]).mean().exp().item()
    before, after = perplexities(model, WINDOWS)
    assert before == pytest.approx(expected, rel=1e-5)
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)),
            "LayerNorm: only an RMS",
        ),
        (
            lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
            "GemmaRMSNorm: only an RMSNorm whose weight is a factor",
        ),
        (lambda: torch.nn.Linear(2, 2), "Linear: no list of decoder layers"),
    ],
)
def test_other_models_are_refused_and_stay_as_they_were(make, message):
    torch.manual_seed(0)
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        off_grid(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
