"""Rules that look as far as the residual stream, on tiny random models."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from torchlamp.huggingface.attached_policy import context_of
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.sites import SITES

FAMILIES = ("llama", "gemma2", "gemma3", "gpt2")


@pytest.fixture(scope="module")
def families(build):
    """With norms whose weights differ from feature to feature, and projections with a bias where there is one."""
    built = {name: build(name) for name in FAMILIES}
    for model in built.values():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                change = torch.randn(parameter.shape, generator=generator)
                parameter.data += change * (0.5 if "norm" in name or "ln_" in name else 0.2)
    return built


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def observe(model, ids, policy):
    """The observations of every layer, one tile each, and what went into and out of some modules."""
    tiles, seen, handles = {}, {}, []

    def note(name):
        def hook(_, inputs, output):
            seen[name] = (inputs[0].detach().double(), output.detach().double())

        return hook

    sites = Sites(model)
    for number, layer in enumerate(sites.layers):
        watched = {
            "first_norm": sites.norms(layer).attention[1],
            "values": sites.modules(SITES["qkv"], layer)[-1],
            "out": sites.modules(SITES["attention_out"], layer)[0],
        }
        handles += [m.register_forward_hook(note((number, name))) for name, m in watched.items()]

    def watch(layer, found):
        assert found.tile.distance.shape == found.chosen.shape  # asked before the tile's scores change
        tiles[layer] = copy.deepcopy(found)

    with lookahead(model, policy, observe=watch) as statistics:
        model(ids)
    for handle in handles:
        handle.remove()
    return tiles, seen, statistics


def what_the_next_norm_reads(model, layer, frozen_outputs):
    """The map from the heads' joint output (float64) to what is added to the stream, times the next norm's weight.

    By hand for each architecture. Of a norm behind the attention only the weight acts, its divisor stays that of
    `frozen_outputs`.
    """
    kind = model.config.model_type
    if kind == "gpt2":
        W, g = layer.attn.c_proj.weight.double(), layer.ln_2.weight.double()
        return lambda o: g * (o @ W - (o @ W).mean(dim=-1, keepdim=True))
    W = layer.self_attn.o_proj.weight.double().T
    if kind == "llama":
        g = layer.post_attention_layernorm.weight.double()
        return lambda o: g * (o @ W)
    g = 1 + layer.pre_feedforward_layernorm.weight.double()
    after = 1 + layer.post_attention_layernorm.weight.double()
    rms = (frozen_outputs @ W).square().mean(dim=-1, keepdim=True).sqrt()
    return lambda o: g * (after * (o @ W) / rms)


def read_of_the_stream(model, layer, x):
    """||g x||, without the mean for a LayerNorm."""
    kind = model.config.model_type
    if kind == "gpt2":
        return (layer.ln_2.weight.double() * (x - x.mean(dim=-1, keepdim=True))).norm(dim=-1)
    if kind == "llama":
        return (layer.post_attention_layernorm.weight.double() * x).norm(dim=-1)
    return ((1 + layer.pre_feedforward_layernorm.weight.double()) * x).norm(dim=-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weight_is_the_change_of_what_the_next_norm_reads(families, name, tokens):
    """By finite differences: one score moves by +-r, everything else is frozen, ||g dx|| / ||g x|| is the weight."""
    model, length, step = families[name], 9, 1e-4
    tiles, seen, _ = observe(model, tokens(1, length), "ps5+running-residual:1e30")
    heads, softcap = 4, 3.0 if name == "gemma2" else None
    compared = 0
    for number, layer in enumerate(Sites(model).layers):
        tile = tiles[number].tile
        x = seen[number, "first_norm"][0][0]
        values = seen[number, "values"][1][0]
        if name == "gpt2":
            values = values.chunk(3, dim=-1)[2]
        values = values.view(length, -1, 8).transpose(0, 1)
        values = values.repeat_interleave(heads // len(values), dim=0)
        scores, visible = tile.scores[0].double(), tile.visible[0]

        def outputs(scores, visible=visible, values=values):
            logits = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            z = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
            return (z @ values).transpose(0, 1).flatten(1)  # queries, heads * size

        frozen = outputs(scores)
        torch.testing.assert_close(seen[number, "out"][0][0], frozen, rtol=1e-4, atol=1e-5)
        added = what_the_next_norm_reads(model, layer, frozen)
        size = read_of_the_stream(model, layer, x)
        slope = 1.0 if tile.slope is None else tile.slope[0].double()
        weight = tile.probabilities[0].double() * slope * tile.distance[0].double()
        for head in range(heads):
            for i, j in ((1, 0), (4, 2), (length - 1, length - 1), (length - 1, 4), (0, 0)):
                if not visible[head, i, j]:
                    continue
                moved = scores.clone()
                moved[head, i, j] += step
                up = added(outputs(moved))
                moved[head, i, j] -= 2 * step
                change = (up - added(outputs(moved))) / (2 * step)
                assert not change[[q for q in range(length) if q != i]].any()
                expected = float(change[i].norm() / size[i])
                assert float(weight[head, i, j]) == pytest.approx(expected, rel=1e-3, abs=1e-7)
                compared += expected > 0
    assert compared >= 2 * heads * 3


@pytest.mark.parametrize("name", FAMILIES)
def test_other_sites_change_nothing(families, name, tokens):
    """The stream that it sees is the call's own, whatever else reads or forgets it."""
    model, ids = families[name], tokens(2, 9)
    policy = "ps4+running-residual:0.02"
    with lookahead(model, policy) as alone:
        model(tokens(1, 4, 5))
        model(ids)
    others = "attention_out=fp32+strict:0.1, mlp_down=fp32+strict:0.1, norm=fp32+strict:0.1"
    with lookahead(model, f"scores={policy}, {others}") as together:
        model(tokens(1, 4, 5))
        model(ids)
    # Other sums of the projections, in another order, are last bits: entries at the threshold may change sides.
    one, other = (s.site_counts("scores").selected.item() for s in (alone, together))
    assert 0 < one < alone.eligible
    assert abs(one - other) <= 0.02 * one + 1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rule", ["running-residual:0.004", "bridge-residual:0.004", "running-output:0.02"])
def test_results_do_not_depend_on_the_batch(families, name, rule, tokens):
    model, ids = families[name], tokens(3, 12)
    with lookahead(model, f"ps4+{rule}") as together:
        whole = model(ids).logits
    with lookahead(model, f"ps4+{rule}") as alone:
        pieces = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-4)
    assert 0 < together.selected < together.eligible
    assert together.site_counts("scores").table.tolist() == alone.site_counts("scores").table.tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_is_one_forward(families, name, cache, tokens):
    model, ids, policy = families[name], tokens(2, 10), "ps23+running-residual:1e-8"
    with lookahead(model, policy) as once:
        whole = model(ids).logits
    past = transformers.DynamicCache(config=model.config)
    if cache == "static":
        past = transformers.StaticCache(config=model.config, max_cache_len=16)
    with lookahead(model, policy) as stepwise:
        pieces = [ids[:, :4], *ids[:, 4:].split(1, dim=1)]
        parts = [model(piece, past_key_values=past, use_cache=True).logits for piece in pieces]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert once.eligible == stepwise.eligible
    assert 0 < once.selected < once.eligible
    assert abs(once.selected - stepwise.selected) <= 0.03 * once.selected


def test_generate(families, tokens):
    for model in families.values():
        expected = model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False)
        with lookahead(model, "fp32+running-residual:1e-9") as statistics:
            assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False), expected)
        assert statistics.position_counts().rows.tolist() == [2 * 4] * (5 + 5)


def test_only_some_layers_look_far(families, tokens):
    model, ids = families["llama"], tokens(1, 9)
    with lookahead(model, "ps4+running-residual:0.001", layers=[1]) as statistics:
        model(ids)
    assert statistics.by_layer[0] == 0 < statistics.by_layer[1] < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_has_its_own_stream(families, name, tokens):
    model, ids, other = families[name], tokens(1, 9), tokens(1, 9, 5)
    with lookahead(model, "ps3+running-residual:0.01") as statistics:
        expected = model(other).logits
        counted = statistics.selected
        clone = copy.deepcopy(model)
        model(ids)
        before = statistics.selected
        assert torch.equal(clone(other).logits, expected)
        assert statistics.selected == before
        attached = next(found.attached for m in clone.modules() if (found := context_of(m)) is not None)
        assert attached.statistics.selected == 2 * counted
        pickle.dumps(model)


def test_nested_blocks_and_exceptions_leave_nothing(families, tokens):
    for model in families.values():
        ids, plain = tokens(1, 6), model(tokens(1, 6)).logits
        with lookahead(model, "ps4+running-residual:0.01") as outer:
            coarse, counted = model(ids).logits, outer.eligible
            with pytest.raises(IndexError), lookahead(model, "ps3+running-residual:0.1"):
                model(torch.tensor([[10**6]]))
            with lookahead(model, "mlp_up=ps23+none"):
                torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
            assert outer.eligible == counted
            assert torch.equal(model(ids).logits, coarse)
        assert torch.equal(model(ids).logits, plain)
        assert not any("forward" in vars(m) or context_of(m) for m in model.modules())


def test_norms_in_other_places_are_refused():
    """GLM 4 has Llama's two norms by name, and one more behind each sublayer."""
    config = transformers.Glm4Config(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Glm4ForCausalLM(config).eval()
    for policy in ("ps4+running-residual:0.1", "mlp_down=ps4+strict:0.1", "norm=ps4+none"):
        with pytest.raises(
            ValueError, match=r"norms that the look-ahead doesn't know: post_self_attn_layernorm"
        ):
            lookahead(model, policy).__enter__()
    with lookahead(model, "scores=ps4+running:0.1, mlp_up=ps4+strict:0.1") as statistics:
        model(torch.tensor([[1, 2]]))
    assert statistics.sites == ["scores", "mlp_up"]
    model.model.layers[0].extra = nn.Identity()  # what is no norm is no obstacle
    with lookahead(model, "qkv=ps4+none"):
        model(torch.tensor([[1, 2]]))


def test_a_norm_in_front_of_the_last_projection_is_refused(build):
    model = build("llama")
    model.model.layers[0].self_attn.attn_sub_norm = nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"attn_sub_norm: a norm in front of the last projection"):
        lookahead(model, "ps4+running-residual:0.001").__enter__()
    with lookahead(model, "ps4+running:0.001"):
        pass


@pytest.mark.parametrize("layers", [1, "0", ["0"], [True]])
def test_layers_must_be_numbers(families, layers):
    with pytest.raises(TypeError, match="give layer numbers in a list"):
        lookahead(families["llama"], "ps4+none", layers=layers).__enter__()
