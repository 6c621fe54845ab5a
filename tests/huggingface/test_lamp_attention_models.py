"""LampAttention's policies on whole models: statistics, evaluation and its JSON, seeds."""

import json

import pytest
import torch
import transformers

import torchlamp
from torchlamp.huggingface.score_bounds import score_bounds
from torchlamp.results.result import Result

POLICY = "lamp8+lamp-attention:0.00390625,0.5"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=32, intermediate_size=16, num_hidden_layers=2, vocab_size=50, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(50, (2, 70), generator=torch.Generator().manual_seed(1))


def test_statistics_count_tiles(model, windows):
    with torch.no_grad(), torchlamp.lookahead(model, POLICY) as statistics:
        model(windows)
    rates, layers = statistics.tile_rates, statistics.tile_rates_by_layer
    assert list(rates) == ["0", "1", "2+", "sub_block", "saturated"]
    assert rates["0"] + rates["1"] + rates["2+"] == pytest.approx(1.0)
    assert len(layers) == 2
    # 5 warps in each of 2 tiles of keys, of which the second is seen by the last warp alone: 2 windows, 4 heads.
    assert int(statistics.tile_counts[:5].sum()) == 2 * 2 * 4 * (5 + 1)
    assert 0 < statistics.recompute_rate <= 1
    assert statistics.warning is None
    statistics.reset()
    assert statistics.tile_rates == {}
    assert statistics.tile_rates_by_layer == []


def test_other_policies_have_no_tiles(model, windows):
    with torch.no_grad(), torchlamp.lookahead(model, "ps4+strict:0.1") as statistics:
        model(windows)
    assert statistics.tile_rates == {}
    assert (
        Result.from_json(torchlamp.evaluate(model, windows, "ps4", baselines=False).to_json()).tile_rates
        == {}
    )


def test_evaluate_compares_with_eight_bits_and_random_choice(model, windows):
    result = torchlamp.evaluate(model, windows, POLICY, compare=["lamp8+all", "lamp8.center+running:0.01"])
    by_role = {run.role: run for run in result.comparisons}
    assert by_role["plain"].policy == "lamp8+none"
    assert by_role["random-like"].policy == f"lamp8+random-like:{POLICY.partition('+')[2]}"
    assert by_role["random-like"].recompute_rate == pytest.approx(result.recompute_rate)
    assert by_role["plain"].tile_rates["0"] == 1.0
    assert by_role["reference"].tile_rates == {}
    everything = next(run for run in result.comparisons if run.policy == "lamp8+all")
    assert everything.kl_mean < result.kl_mean < by_role["plain"].kl_mean
    assert everything.tile_rates["sub_block"] == 1.0
    assert f"2+ recomputed sub-blocks of 16 keys: {result.tile_rates['0']:.1%}, " in repr(result)
    record = json.loads(result.to_json())
    assert record["tile_rates"] == result.tile_rates
    assert Result.from_json(result.to_json()) == result


def test_seeds_of_random_rounding(model, windows):
    policy = "e4m3fn-sat/online11/stochastic+none"
    first, again, other = (
        torchlamp.evaluate(model, windows, policy, baselines=False, seed=seed).kl_mean for seed in (0, 0, 1)
    )
    assert first == again != other


def test_steps_of_decoding(model, windows):
    """One query at a time goes through the same tiles of keys: rows of a warp of their own."""
    with torch.no_grad(), torchlamp.lookahead(model, "lamp8+all"):
        whole = model(windows[:1]).logits[0, -1]
        cache = transformers.DynamicCache()
        model(windows[:1, :-1], past_key_values=cache)
        step = model(windows[:1, -1:], past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(whole, step, rtol=1e-4, atol=1e-5)


def test_norms_of_queries_and_keys_bound_scores(model, windows):
    """The paper's figure, gains of both norms, and that no score of a forward pass exceeds its layer's bound."""
    layers = [layer.self_attn for layer in model.model.layers]
    try:
        with torch.no_grad():
            layers[0].q_norm.weight.fill_(2.0)
            layers[0].k_norm.weight.copy_(torch.linspace(-3.0, 1.0, 16))
        bounds = score_bounds(model)
        assert bounds == pytest.approx([16**0.5 * 2 * 3, 16**0.5], rel=1e-4)
        largest = {}

        def observe(layer, seen):
            top = float(seen.exact[seen.tile.visible].abs().max())
            largest[layer] = max(top, largest.get(layer, 0.0))

        with torch.no_grad(), torchlamp.lookahead(model, "fp32+none", observe=observe):
            model(windows)
        assert all(largest[i] <= bound for i, bound in enumerate(bounds))
        assert largest[0] > bounds[0] / 20
    finally:
        with torch.no_grad():
            for norm in (layers[0].q_norm, layers[0].k_norm):
                norm.weight.fill_(1.0)


@pytest.mark.parametrize(("gain", "fits"), [(6.29, True), (6.30, False)])
def test_the_published_gain(gain, fits):
    config = transformers.Qwen3Config(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9, num_attention_heads=1,
        num_key_value_heads=1, head_dim=128,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    for norm in (model.model.layers[0].self_attn.q_norm, model.model.layers[0].self_attn.k_norm):
        torch.nn.init.constant_(norm.weight, gain)
    assert (score_bounds(model)[0] <= 448) == fits


def test_gains_of_gemma_and_models_without_norms():
    """Gemma's gain is 1 + weight; a Llama has no such norms."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    gemma = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**sizes, **heads, query_pre_attn_scalar=4)
    )
    for norm in (gemma.model.layers[0].self_attn.q_norm, gemma.model.layers[0].self_attn.k_norm):
        torch.nn.init.constant_(norm.weight, 0.5)
    assert score_bounds(gemma) == pytest.approx([16 * 1.5**2 / 2], rel=1e-4)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    assert score_bounds(llama) == [None]
