"""With full precision, or everything recomputed, a model computes what its own eager attention computes."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import torchlamp
from torchlamp.kernels import native

KERNELS = ["torch", native.instruction_set()] if native.available() else ["torch"]
#: `+all` recomputes in the transformed representative, whose float32 products are the model's to rounding.
EXACT = (
    "ps23+none",
    "ps4+all",
    "ps4.center.sort+all",
    "int8@ps7.center.balance+all",
    "int4.center.hadamard+all",
)
CASES = ("one", "short", "longer than a tile", "batch", "left", "right")


@pytest.fixture(params=KERNELS, autouse=True)
def kernels(request, monkeypatch):
    """The tile loop over the torch references, and whatever runs natively."""
    monkeypatch.setenv("TORCHLAMP_KERNELS", request.param)


def assert_close(actual, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward(model, padded, case, policy):
    expected = model(**padded[case]).logits
    with torchlamp.lookahead(model, policy):
        actual = model(**padded[case]).logits
    assert_close(actual, expected)


def stepwise(model, ids, pieces, cache, mask=None):
    """Logits of a sequence fed piece by piece through a cache."""
    out, start = [], 0
    for piece in pieces:
        stop = start + piece
        attention_mask = None if mask is None else mask[:, :stop]
        step = model(ids[:, start:stop], past_key_values=cache, attention_mask=attention_mask, use_cache=True)
        out.append(step.logits)
        start = stop
    return torch.cat(out, dim=1)


PIECES = {"token by token": [1] * 12, "prefill and decode": [9, 1, 1, 1], "chunks": [4, 5, 1, 2]}


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pieces", PIECES)
@torch.no_grad()
def test_caches(model, tokens, policy, kind, pieces):
    ids = tokens(2, 12)

    def cache():
        return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, 16)

    expected = stepwise(model, ids, PIECES[pieces], cache())
    with torchlamp.lookahead(model, policy):
        actual = stepwise(model, ids, PIECES[pieces], cache())
    assert_close(actual, expected)
    assert_close(actual, model(ids).logits)


@pytest.mark.parametrize("policy", EXACT)
@torch.no_grad()
def test_padded_decoding(model, tokens, policy):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    pieces = PIECES["prefill and decode"]
    expected = stepwise(model, ids, pieces, DynamicCache(config=model.config), mask)
    with torchlamp.lookahead(model, policy):
        actual = stepwise(model, ids, pieces, DynamicCache(config=model.config), mask)
    assert_close(actual, expected)


@torch.no_grad()
def test_additive_and_boolean_masks_of_four_dimensions(model, tokens):
    ids = tokens(2, 9)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).clamp_min(0).float()
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    bias = torch.where(visible, -0.3 * distance, torch.finfo(torch.float32).min)[None, None].expand(
        2, 1, 9, 9
    )
    expected = model(ids, attention_mask=bias).logits
    plain = model(
        ids, attention_mask=torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    ).logits
    with torchlamp.lookahead(model, "ps23+none"):
        assert_close(model(ids, attention_mask=bias).logits, expected)
        assert_close(model(ids, attention_mask=visible[None, None]).logits, plain)
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}]
)
@torch.no_grad()
def test_generate(model, tokens, options):
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **options}
    if options.get("num_beams"):
        # Beam scores of a random model nearly tie; a window of one sequence is enough to exercise reordering.
        settings["length_penalty"] = 1.0
    expected = model.generate(ids, **settings)
    with torchlamp.lookahead(model, "ps23+none"):
        actual = model.generate(ids, **settings)
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_generate_is_the_same_with_and_without_cache(model, tokens):
    ids = tokens(1, 7)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torchlamp.lookahead(model, "ps4+strict:0.05") as stats:
        cached = model.generate(ids, use_cache=True, **settings)
        again = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached, again)
    assert stats.selected > 0


@torch.no_grad()
def test_low_precision_changes_something(model, tokens):
    ids = tokens(1, 30)
    expected = model(ids).logits
    with torchlamp.lookahead(model, "ps2+none"):
        coarse = model(ids).logits
    assert (coarse - expected).abs().max() > 1e-3


@torch.no_grad()
def test_scaling_of_the_model_is_used(build, tokens):
    model = copy.deepcopy(build("gemma3"))
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.37
    expected = model(tokens(1, 9)).logits
    with torchlamp.lookahead(model, "ps23+none"):
        assert_close(model(tokens(1, 9)).logits, expected)
