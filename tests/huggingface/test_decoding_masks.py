"""4-D attention masks of a prepared model: booleans, additive zeros and minima, and additive biases."""

import pytest
import torch
from decoding_models import WHOLE, is_untouched
from transformers import DynamicCache

from torchlamp.huggingface.prepare import prepare

pytestmark = pytest.mark.usefixtures("no_grad")
#: Everything is read in full, so that only the mask can make a difference.
EXACT = (
    "scores=int8+all, values=int8+all, qkv=int12, attention_out=int12, mlp_up=int12+all, mlp_down=int12+all"
)
ATTENTION = "scores=int8+all, values=int8+all"
LENGTH, PROMPT = 6, 3
LOWEST = torch.finfo(torch.float32).min


def causal(batch, heads=1):
    """Additive, float32 (batch, heads, queries, keys): zeros and the lowest number."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return torch.where(seen, 0.0, LOWEST).expand(batch, heads, -1, -1).clone()


def biased(batch, heads=1):
    noise = torch.randn(batch, heads, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3))
    return causal(batch, heads) + 2 * noise


def padded(batch, hidden=LOWEST):
    mask = causal(batch)
    mask[0, :, :, 1] = mask[-1, :, 4:, 0] = hidden
    return mask


MASKS = {
    "boolean": lambda: padded(3) == 0,
    "zeros and the lowest": lambda: padded(3),
    "zeros and -inf": lambda: padded(3, -torch.inf),
    "zeros and half the lowest": lambda: padded(3, LOWEST / 2),
    "biases": lambda: biased(3),
    "biases and padding": lambda: torch.minimum(biased(3), padded(3)),
    "biases above zero": lambda: (biased(3) - causal(3)).abs() + causal(3),
    "a small bias": lambda: padded(3, -1.5),
    "biases of each head": lambda: biased(3, 4),
    "booleans of each head": lambda: (biased(3, 4) > -2) | torch.eye(LENGTH, dtype=torch.bool),
    "float64": lambda: padded(3).double(),
    "bfloat16": lambda: padded(3, torch.finfo(torch.bfloat16).min).bfloat16(),
    "one for all sequences": lambda: biased(1),
}


def steps(model, tokens, mask, cache, prompt=PROMPT):
    """Logits of the prompt and of each token after it, under a mask (batch, heads, queries, keys)."""
    parts = [
        model(tokens[:, :prompt], attention_mask=mask[:, :, :prompt, :prompt], past_key_values=cache).logits
    ]
    for t in range(prompt, tokens.shape[1]):
        step = mask[:, :, t : t + 1, : t + 1]
        parts.append(model(tokens[:, t : t + 1], attention_mask=step, past_key_values=cache).logits)
    return torch.cat(parts, 1)


def eager(model, tokens, mask):
    """What transformers' eager attention, which adds masks, makes of it."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, LOWEST)
    mask = mask.float()
    return steps(model, tokens, mask, DynamicCache(config=model.config))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", [*WHOLE, "gpt_oss"])
def test_masks_of_four_dimensions_are_those_of_eager_attention(build, tokens, name, kind):
    model, x, mask = build(name), tokens(3, LENGTH), MASKS[kind]()
    want = eager(model, x, mask)
    with prepare(model, ATTENTION, full="float32") as prepared:
        got = steps(model, x, mask, prepared.cache())
        longer = steps(model, x, mask, prepared.cache(), prompt=LENGTH)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(longer, want, rtol=1e-4, atol=1e-4)
    assert is_untouched(model)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", WHOLE[:5])
def test_layers_in_one_call_see_the_same_mask(build, tokens, name, kind):
    model, x, mask = build(name), tokens(3, LENGTH), MASKS[kind]()
    want = eager(model, x, mask)
    with prepare(model, EXACT, full="float32") as prepared:
        got = steps(model, x, mask, prepared.cache())
    assert (got - want).norm() < 3e-3 * want.norm()


def test_what_biases_make_full_is_counted(build, tokens):
    model, x = build("llama"), tokens(3, LENGTH)
    for kind, rates in (
        ("biases", {"scores": 1.0, "values": 1.0}),
        ("boolean", {"scores": 0.0, "values": 0.0}),
    ):
        mask = MASKS[kind]()
        with prepare(model, "scores=int8+none, values=int8+none") as prepared:
            steps(model, x, mask, prepared.cache())
        assert prepared.statistics.recompute_rates == rates
        # Two layers of four heads; a key of hidden weight isn't eligible.
        seen = int(
            (mask[:, 0, PROMPT:] if mask.dtype == torch.bool else mask[:, 0, PROMPT:] > LOWEST / 2).sum()
        )
        assert prepared.statistics.eligible_by_site == {"scores": 2 * 4 * seen, "values": 2 * 2 * seen}
