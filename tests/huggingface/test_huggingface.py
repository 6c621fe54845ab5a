"""Attaching, restoring, and what is refused."""

import copy
import subprocess
import sys
import types

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, DynamicCache

import torchlamp
import torchlamp.simulation.attention as simulated
from torchlamp.huggingface.attached_policy import context_of
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.huggingface.simulated_attention import lamp_attention


def implementation(model):
    return model.config._attn_implementation


def attached(model):
    return any(context_of(module) is not None for module in model.modules())


@torch.no_grad()
def test_lookahead_restores(llama, tokens):
    before = llama(tokens(1, 9)).logits
    keys = set(vars(llama))
    with lookahead(llama, "ps4+none") as stats:
        assert implementation(llama) == "lamp"
        llama(tokens(1, 9))
    assert stats.eligible > 0
    assert implementation(llama) == "eager"
    assert not attached(llama)
    assert set(vars(llama)) == keys
    assert torch.equal(llama(tokens(1, 9)).logits, before)


def test_lookahead_restores_after_an_exception(llama):
    with pytest.raises(KeyError), lookahead(llama, "ps4+none"):
        raise KeyError
    assert implementation(llama) == "eager"
    assert not attached(llama)


@torch.no_grad()
def test_nested_blocks_restore_the_outer_one(llama, tokens):
    ids = tokens(1, 9)
    with lookahead(llama, "ps2+none") as outer:
        coarse = llama(ids).logits
        with lookahead(llama, "ps23+none") as inner:
            fine = llama(ids).logits
        assert implementation(llama) == "lamp"
        assert torch.equal(llama(ids).logits, coarse)
    assert outer.eligible == 2 * inner.eligible
    assert not torch.equal(fine, coarse)
    assert implementation(llama) == "eager"


@torch.no_grad()
def test_policy_object_and_string_are_the_same(llama, tokens):
    with lookahead(llama, torchlamp.Policy(accumulate="ps4", rule="strict:0.01")) as first:
        one = llama(tokens(1, 9)).logits
    with lookahead(llama, "ps4+strict:0.01") as second:
        assert torch.equal(llama(tokens(1, 9)).logits, one)
    assert first.selected == second.selected > 0


@torch.no_grad()
def test_attach_and_detach(build, tokens):
    model = build("qwen3")
    eager = model(tokens(1, 9)).logits
    stats = torchlamp.attach(model, "ps23+none")
    assert torch.equal(model(tokens(1, 9)).logits, eager)
    assert stats.eligible == 0
    model.set_attn_implementation("lamp")
    torch.testing.assert_close(model(tokens(1, 9)).logits, eager, rtol=1e-4, atol=1e-5)
    assert stats.eligible == 2 * 4 * 45
    other = torchlamp.attach(model, "ps4+all")
    model(tokens(1, 9))
    assert (stats.selected, other.selected) == (0, 2 * 4 * 45)
    torchlamp.detach(model)
    with pytest.raises(RuntimeError, match=r"'lamp' but has no policy: use torchlamp.lookahead"):
        model(tokens(1, 9))
    model.set_attn_implementation("eager")
    assert torch.equal(model(tokens(1, 9)).logits, eager)


@torch.no_grad()
def test_other_models_are_not_touched(build, tokens):
    one, other = build("llama"), build("llama")
    clone = copy.deepcopy(one)
    with lookahead(one, "ps2+none"):
        assert implementation(other) == implementation(clone) == "eager"
        assert torch.equal(other(tokens(1, 9)).logits, clone(tokens(1, 9)).logits)
        with lookahead(clone, "ps23+none") as stats:
            clone(tokens(1, 9))
            assert stats.eligible > 0
        assert implementation(one) == "lamp"


@torch.no_grad()
def test_a_copy_made_inside_the_block_counts_for_itself(build, tokens):
    model = build("llama")
    with lookahead(model, "ps4+all") as stats:
        model(tokens(1, 5))
        clone = copy.deepcopy(model)
        clone(tokens(1, 5))
        assert stats.eligible == 2 * 4 * 15
    assert implementation(clone) == "lamp"


def test_sub_configs_are_restored():
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**text, **heads},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    config._attn_implementation = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    model = transformers.Gemma3ForConditionalGeneration(config).eval()

    def all_three():
        configs = (model.config, model.config.text_config, model.config.vision_config)
        return [config._attn_implementation for config in configs]

    assert all_three() == ["sdpa", "eager", "sdpa"]
    with lookahead(model, "ps4+none"):
        assert all_three() == ["lamp"] * 3
    assert all_three() == ["sdpa", "eager", "sdpa"]


class TestRefused:
    def test_not_transformers(self):
        with (
            pytest.raises(TypeError, match="Linear is no transformers model"),
            lookahead(nn.Linear(2, 2), "ps4+none"),
        ):
            pass

    @pytest.mark.parametrize("family", ["Mamba", "Bloom", "Falcon"])
    def test_without_the_interface(self, family):
        config = getattr(transformers, f"{family}Config")(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, n_head=2
        )
        config.num_attention_heads = 2
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        before = implementation(model)
        words = f"{family}ForCausalLM doesn't use transformers' attention interface"
        with pytest.raises(ValueError, match=words), lookahead(model, "ps4+none"):
            pass
        with pytest.raises(ValueError, match=words):
            torchlamp.attach(model, "ps4+none")
        assert implementation(model) == before
        assert not attached(model)

    def test_interface_that_can_not_be_switched(self, build, monkeypatch):
        model = build("llama")
        monkeypatch.setattr(type(model), "_can_set_attn_implementation_cached_value", False, raising=False)
        with pytest.raises(ValueError, match="doesn't use"), lookahead(model, "ps4+none"):
            pass
        assert implementation(model) == "eager"
        assert not attached(model)

    @pytest.mark.parametrize("start", [lookahead, torchlamp.attach])
    def test_rule_at_a_site_that_does_not_fit(self, llama, start):
        with pytest.raises(
            ValueError, match=r"'topz:0.1' can't run at the site mlp_up: it looks through a softmax"
        ):
            start(llama, "scores=ps4+none, mlp_up=ps7+topz:0.1").__enter__()
        assert not attached(llama)

    def test_unknown_policy(self, llama):
        with pytest.raises(ValueError, match="unknown rule 'stritc'"), lookahead(llama, "ps4+stritc:0.1"):
            pass
        assert implementation(llama) == "eager"

    @torch.no_grad()
    def test_other_dtypes(self, build, tokens):
        model = build("llama").to(torch.float64)
        words = r"queries of torch.float64: .*dtype=torch.float32"
        with lookahead(model, "ps4+none"), pytest.raises(TypeError, match=words):
            model(tokens(1, 4))

    @torch.no_grad()
    def test_autocast(self, llama, tokens):
        # The cache makes float32 of what autocast made bfloat16, so the dtypes alone don't show it.
        words = "under autocast: .*leave autocast off"
        for rule in ("strict:0.1", "mass:0.5"):
            with (
                lookahead(llama, f"ps4+{rule}"),
                torch.autocast("cpu", dtype=torch.bfloat16),
                pytest.raises(TypeError, match=words),
            ):
                llama(tokens(1, 4))

    @torch.no_grad()
    def test_attention_weights(self, llama, tokens):
        with lookahead(llama, "ps4+none"), pytest.raises(ValueError, match="output_attentions=True"):
            llama(tokens(1, 4), output_attentions=True)

    def test_dropout_in_training(self, build, tokens):
        model = build("llama").train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        with lookahead(model, "ps4+none"), pytest.raises(ValueError, match=r"attention dropout 0.1"):
            model(tokens(1, 4))
        model.eval()
        with lookahead(model, "ps4+none"):
            model(tokens(1, 4))

    @pytest.mark.parametrize(
        "name", ["position_bias", "cache", "cu_seq_lens_q", "cu_seq_lens_k", "indices", "novelty"]
    )
    def test_arguments_that_change_the_result(self, llama, name):
        module = llama.model.layers[0].self_attn
        query = torch.zeros(1, 4, 3, 8)
        key = torch.zeros(1, 2, 3, 8)
        with lookahead(llama, "ps4+none"):
            lamp_attention(module, query, key, key, None, **{name: None}, use_cache=True, sliding_window=3)
            with pytest.raises(ValueError, match=f"LlamaAttention passes '{name}'"):
                lamp_attention(module, query, key, key, None, **{name: torch.zeros(1)})

    @torch.no_grad()
    def test_cumulative_lengths_through_a_model(self, llama, tokens):
        with lookahead(llama, "ps4+none"), pytest.raises(ValueError, match="'cu_seq_lens_q'"):
            llama(tokens(1, 4), cu_seq_lens_q=torch.tensor([0, 2, 4]), max_length_q=2)


@pytest.mark.parametrize("training", [False, True])
def test_forward_without_no_grad_and_a_clear_error_on_backward(build, tokens, training):
    model = build("gpt2").train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        expected = model(tokens(1, 9)).logits
    with lookahead(model, "ps4+all"):
        logits = model(tokens(1, 9)).logits
        torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="no gradient flows through look-ahead"):
            logits.sum().backward()
        frozen = model.requires_grad_(False)
        assert not frozen(tokens(1, 9)).logits.requires_grad


@pytest.mark.parametrize("is_causal", [None, False])
def test_causality_of_module_and_argument(llama, is_causal):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    attention_module = types.SimpleNamespace(is_causal=is_causal is None)
    with lookahead(llama, "ps23+none"):
        attention_module._torchlamp = context_of(llama.model.layers[0].self_attn)
        for module, argument in ((attention_module, None), (llama.model.layers[0].self_attn, is_causal)):
            actual, weights = lamp_attention(module, query, key, value, None, is_causal=argument)
            expected = nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=is_causal is None, enable_gqa=True
            )
            torch.testing.assert_close(actual.transpose(1, 2), expected)
            assert weights is None


class TestStatistics:
    @torch.no_grad()
    def test_everything_is_counted_once(self, model, padded):
        for name, inputs in padded.items():
            with lookahead(model, "ps4+all") as stats:
                model(**inputs)
                model(**inputs)
            assert stats.recompute_rate == 1.0, name
            assert stats.rows_touched == 1.0, name
            assert stats.by_layer == [1.0, 1.0], name
            assert stats.by_head == [[1.0] * 4] * 2, name
        with lookahead(model, "ps4+none") as stats:
            model(**inputs)
        assert (stats.recompute_rate, stats.rows_touched, stats.by_layer) == (0.0, 0.0, [0.0, 0.0])
        assert stats.eligible > 0

    @pytest.mark.parametrize("side", ["left", "right"])
    @torch.no_grad()
    def test_padding_counts_like_single_sequences(self, build, tokens, side):
        model = build("llama")
        ids, lengths = tokens(3, 17), (17, 12, 1)
        mask = torch.zeros_like(ids)
        position_ids = torch.zeros_like(ids)
        with lookahead(model, "ps4+strict:0.02") as single:
            for row, length in enumerate(lengths):
                part = slice(17 - length, 17) if side == "left" else slice(0, length)
                mask[row, part] = 1
                position_ids[row, part] = torch.arange(length)
                model(ids[row : row + 1, part])
        with lookahead(model, "ps4+strict:0.02") as batch:
            model(ids, attention_mask=mask, position_ids=position_ids)
        if side == "right":
            # Padding queries behind a sequence see it, and so they count; they stand at position 0 here.
            extra = [(17 - n) * n for n in lengths]
            assert batch.eligible == single.eligible + 2 * 4 * sum(extra)
            assert (
                batch.position_counts().eligible[1:].tolist()
                == single.position_counts().eligible[1:].tolist()
            )
        else:
            assert (batch.eligible, batch.rows) == (single.eligible, single.rows)
            assert abs(batch.selected - single.selected) <= 0.02 * single.selected
            assert batch.position_counts().eligible.tolist() == single.position_counts().eligible.tolist()
        assert single.selected > 0

    @torch.no_grad()
    def test_decoding_counts_like_one_forward(self, build, tokens):
        model, ids = build("mistral"), tokens(2, 14)
        with lookahead(model, "ps4+strict:0.02") as whole:
            model(ids)
        with lookahead(model, "ps4+strict:0.02") as pieces:
            cache, start = DynamicCache(config=model.config), 0
            for size in (6, 3, 1, 1, 1, 1, 1):
                model(ids[:, start : start + size], past_key_values=cache)
                start += size
        assert pieces.by_layer == pytest.approx(whole.by_layer, rel=0.05)
        assert pieces.position_counts().eligible.tolist() == whole.position_counts().eligible.tolist()
        visible = [min(i + 1, 6) for i in range(14)]
        assert whole.position_counts(0).eligible.tolist() == [2 * 4 * n for n in visible]

    @torch.no_grad()
    def test_unused_cache_slots_never_count(self, llama, tokens):
        settings = {
            "max_new_tokens": 4,
            "do_sample": False,
            "attention_mask": torch.ones(1, 6, dtype=torch.long),
        }
        with lookahead(llama, "ps4+all") as dynamic:
            llama.generate(tokens(1, 6), **settings)
        with lookahead(llama, "ps4+all") as static:
            llama.generate(tokens(1, 6), cache_implementation="static", **settings)
        assert static.eligible == dynamic.eligible == 2 * 4 * sum(range(1, 10))
        assert static.recompute_rate == 1.0

    @torch.no_grad()
    def test_random_rules_follow_the_seed_and_not_the_batch(self, build, tokens):
        model, ids = build("llama"), tokens(2, 20)

        def run(batch, seed):
            with lookahead(model, "ps3+random:0.3", seed=seed) as stats:
                return model(batch).logits, stats

        both, stats = run(ids, 0)
        assert stats.recompute_rate == pytest.approx(0.3, abs=0.06)
        torch.testing.assert_close(run(ids[1:], 0)[0], both[1:], rtol=1e-4, atol=1e-4)
        assert torch.equal(run(ids, 0)[0], both)
        assert not torch.equal(run(ids, 1)[0], both)

    @torch.no_grad()
    def test_layers_are_in_the_order_they_run(self, build, tokens):
        model = build("gpt2")
        model.transformer.h[1].attn.scaling *= 0.0
        with lookahead(model, "ps4+strict:0.001") as stats:
            model(tokens(1, 12))
        assert stats.by_layer[0] > 0
        assert stats.by_layer[1] == 0


def test_registered_under_a_name_that_dispatch_leaves_alone():
    import torchlamp.huggingface.lookahead as room

    assert "lamp" in AttentionInterface._global_mapping
    assert not any(word in room.NAME for word in ("sdpa", "flash", "flex", "/", "|"))


def test_import_is_light():
    script = (
        "import sys, torchlamp; assert 'transformers' not in sys.modules and 'torch' not in sys.modules; "
        "torchlamp.Policy.parse('ps4+none'); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names():
    ready = set(torchlamp.__all__) - {"Result", "evaluate", "load"}
    for name in ready:
        assert getattr(torchlamp, name) is not None
    assert set(dir(torchlamp)) == set(torchlamp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lookbehind'"):
        torchlamp.lookbehind  # noqa: B018


class TestObserver:
    def test_it_sees_every_tile_of_the_scores(self, llama, tokens):
        seen = []
        with (
            torch.no_grad(),
            lookahead(llama, "ps3+strict:0.1", observe=lambda n, found: seen.append((n, found))) as stats,
        ):
            llama(tokens(2, 9))
        assert [layer for layer, _ in seen] == [0, 0, 1, 1]
        assert sum(int(found.chosen.sum()) for _, found in seen) == stats.selected > 0

    def test_layers_that_nobody_observes_keep_the_fused_kernel(self, llama, tokens, monkeypatch):
        tiled, seen = [], []
        original = simulated.tiled_attention
        monkeypatch.setattr(
            simulated,
            "tiled_attention",
            lambda call, *args: tiled.append(call.layer) or original(call, *args),
        )
        monkeypatch.setattr(simulated, "fused", lambda call, *_: None if call.observe else original(call, *_))
        with (
            torch.no_grad(),
            lookahead(llama, "ps3+strict:0.1", observe=lambda n, _: seen.append(n), observe_layers=[1]),
        ):
            llama(tokens(1, 9))
        assert tiled == [1]
        assert seen == [1]

    def test_layers_must_be_numbers(self, llama):
        with (
            pytest.raises(TypeError, match="observe_layers='all': give layer numbers in a list"),
            lookahead(llama, "ps4+none", observe=print, observe_layers="all"),
        ):
            pass
