import pytest
import torch
import transformers
from decoding_models import GUARDED, LINEAR, STEADY, WHOLE, decoded, generated, is_untouched, left_padding
from torch import nn
from transformers import DynamicCache

from torchlamp.huggingface import decode_plan
from torchlamp.huggingface import prepare as decoding
from torchlamp.huggingface.decode_layer import NativeLayer
from torchlamp.huggingface.prepare import prepare
from torchlamp.huggingface.sites import Sites
from torchlamp.kernels import native
from torchlamp.kernels.low_bit_matrix import LowBitMatrix
from torchlamp.policy.decodable import settings
from torchlamp.policy.policy import Policy
from torchlamp.policy.sites import SITES

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", [*WHOLE, "gpt2"])
def test_linear_sites_are_those_of_the_dequantised_model(build, tokens, name):
    model, other, x = build(name), build(name), tokens(3, 16)
    policy = LINEAR if name != "gpt2" else LINEAR.partition(", mlp")[0]
    sites = Sites(other)
    bits = {site: told.bits for site, told in settings(Policy.parse(policy)).items()}
    for layer in sites.layers:
        by_site = {name: sites.modules(SITES[name], layer) for name in ("qkv", "attention_out")}
        if "mlp_up" in bits:
            by_site |= {name: sites.modules(SITES[name], layer) for name in ("mlp_up", "mlp_down")}
        for site, modules in by_site.items():
            for module in modules:
                rows = sites.weights(module).matrix.T
                low = LowBitMatrix.pack(rows.contiguous(), bits[site]).dequantised()
                module.weight.copy_(low if isinstance(module, nn.Linear) else low.T)
    mask = left_padding(3, 16)
    # The prompt runs in full precision, in both: neither is prepared yet.
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        model(x[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
    with prepare(model, policy) as prepared:
        for t in range(9, 16):
            step = {"input_ids": x[:, t : t + 1], "attention_mask": mask[:, : t + 1]}
            got = model(**step, past_key_values=caches[0]).logits
            want = other(**step, past_key_values=caches[1]).logits
            torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
            assert (got - want).norm() < 5e-4 * want.norm()
    assert prepared.statistics.selected == 0


@pytest.mark.parametrize("name", WHOLE)
def test_decoding_is_close_to_full_precision(build, tokens, name):
    model, x, mask = build(name), tokens(3, 20), left_padding(3, 20)
    want = decoded(model, x, DynamicCache(config=model.config), mask=mask)
    with prepare(model, GUARDED, top=3) as prepared:
        got = decoded(model, x, prepared.cache(), mask=mask)
    assert (got - want).norm() < 0.03 * want.norm()
    eligible = prepared.statistics.eligible_by_site
    assert list(prepared.statistics.recompute_rates) == ["scores", "values", "mlp_up", "mlp_down", "lm_head"]
    assert eligible["lm_head"] == 3 * 20 * 61
    assert eligible["mlp_up"] == eligible["mlp_down"] == 2 * 3 * 20 * 48
    assert all(0 < rate <= 1 for rate in prepared.statistics.recompute_rates.values())


@pytest.mark.skipif(not native.available(), reason="layers are fused by the native kernels alone")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", [STEADY, GUARDED])
@pytest.mark.parametrize("name", WHOLE[:5])
def test_layers_in_one_call_equal_their_modules(build, tokens, monkeypatch, name, policy, padded):
    model, x = build(name), tokens(3, 30)
    mask = left_padding(3, 30) if padded else None
    calls = []
    kernel = NativeLayer.kernel
    monkeypatch.setattr(
        NativeLayer, "kernel", lambda self, isa: calls.append(self.number) or kernel(self, isa)
    )
    with prepare(model, policy) as prepared:
        got = decoded(model, x, prepared.cache(), mask=mask)
        counts = prepared.statistics
    assert calls == [0, 1] * 22
    monkeypatch.setattr(decode_plan, "can_fuse", lambda layer, rows: False)
    with prepare(model, policy) as prepared:
        want = decoded(model, x, prepared.cache(), mask=mask)
    assert calls == [0, 1] * 22
    assert (got - want).norm() < (2e-4 if policy == STEADY else 3e-3) * want.norm()
    assert counts.eligible_by_site == prepared.statistics.eligible_by_site
    for layer in (-1, 0, 1):
        eligible = counts.layer_counts(layer).eligible
        assert eligible == prepared.statistics.layer_counts(layer).eligible
        assert eligible > 0 or layer == -1
    for site, selected in counts.selected_by_site.items():
        # Rounding may take an entry over its threshold.
        assert abs(selected - prepared.statistics.selected_by_site[site]) <= 3 + 0.01 * selected


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_whole_windows_parts_and_other_caches_are_near_float32(build, tokens, name):
    model, x = build(name), tokens(2, 14)
    want = model(x).logits
    with prepare(model, GUARDED) as prepared:
        whole = model(x).logits
        assert 1e-5 * want.norm() < (whole - want).norm() < 0.03 * want.norm()
        cache = prepared.cache()
        parts = [model(part, past_key_values=cache).logits for part in (x[:, :6], x[:, 6:])]
        assert (torch.cat(parts, 1) - want).norm() < 0.03 * want.norm()
        assert (parts[0] - whole[:, :6]).norm() < 1e-3 * want.norm()
        plain = decoded(model, x, DynamicCache(config=model.config))
        assert (plain - want[:, 9:]).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("top", [1, 5])
def test_the_heads_largest_logits_are_full_ones(build, tokens, top):
    model, x = build("llama"), tokens(4, 1)
    hidden = torch.randn(50, 1, 32, generator=torch.Generator().manual_seed(0))
    want = model.lm_head(hidden)[:, 0]
    with prepare(model, "lm_head=int4", top=top) as prepared:
        got = model.lm_head(hidden)[:, 0]
    assert torch.equal(got.topk(top).indices, want.topk(top).indices)
    torch.testing.assert_close(got.topk(top).values, want.topk(top).values)
    assert prepared.statistics.eligible_by_site == {"lm_head": 50 * 61}
    assert not torch.allclose(got, want, rtol=1e-4)
    assert torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_greedy_text_is_that_of_the_full_head(model, tokens, bits):
    x = tokens(2, 9)
    want = generated(model, x, 30)
    with prepare(model, f"lm_head=int{bits}") as prepared:
        assert torch.equal(generated(model, x, 30), want)
    assert 0 < prepared.statistics.recompute_rates["lm_head"] <= 1


@pytest.mark.parametrize("policy", [decoding.DEFAULT, decoding.FAST])
def test_named_policies_can_be_read(build, policy):
    with prepare(build("llama"), policy) as prepared:
        assert Policy.parse(str(prepared.policy)) == Policy.parse(policy)
    with prepare(build("llama")) as prepared:
        assert prepared.policy == Policy.parse(decoding.DEFAULT)


def test_generate_makes_a_look_ahead_cache_unless_told_otherwise(build, tokens):
    model, x = build("llama"), tokens(1, 7)
    with prepare(model, GUARDED) as prepared:
        generated(model, x)
        counted = prepared.statistics.eligible_by_site["scores"]
        assert counted > 0
        model.generate(x, max_new_tokens=4, do_sample=False, use_cache=False)
        model.generate(
            x, max_new_tokens=4, do_sample=False, past_key_values=DynamicCache(config=model.config)
        )
        assert prepared.statistics.eligible_by_site["scores"] == counted


def test_gpt2_has_no_gated_mlp_but_all_else(build, tokens, caplog):
    model, x = build("gpt2"), tokens(2, 16)
    with pytest.raises(ValueError, match="runs gated MLPs without biases only; leave both out"):
        prepare(model, "mlp_up=int8, mlp_down=int8")
    assert is_untouched(model)
    want = decoded(model, x, DynamicCache(config=model.config))
    with prepare(model, "qkv=int12, attention_out=int12, lm_head=int12") as prepared:
        got = decoded(model, x, DynamicCache(config=model.config))
    assert (got - want).norm() < 0.01 * want.norm()
    assert prepared.statistics.sites == ["lm_head"]
    with prepare(model) as prepared:  # the default, less what GPT-2 doesn't allow
        assert "mlp_up" not in prepared.policy.sites
        assert "mlp_up and mlp_down: read in full precision, since" in caplog.text


def test_biases_of_attention_and_mlp(tokens):
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, initializer_range=0.25,
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    x = tokens(2, 16)
    want = decoded(model, x, DynamicCache(config=model.config))
    with prepare(model, "qkv=int12, attention_out=int12"):
        got = decoded(model, x, DynamicCache(config=model.config))
    assert (got - want).norm() < 0.01 * want.norm()
    with pytest.raises(ValueError, match="without biases only"):
        prepare(model, LINEAR)
    model.lm_head.bias = nn.Parameter(torch.ones(61))
    with pytest.raises(ValueError, match="head has a bias"):
        prepare(model, "lm_head=int8")
    assert is_untouched(model)


def test_a_prepared_policy_is_what_really_runs(build, tokens, caplog):
    model, attention = build("llama"), "scores=int8{}, values=int8"
    for named, keywords, runs in (
        (".center", {}, ".center"),
        (".center.hadamard", {"hadamard": False}, ".center"),
        ("", {"center": True}, ".center"),
        ("", {"center": True, "hadamard": True}, ".center.hadamard"),
        (".hadamard", {"center": False}, ".hadamard"),
    ):
        with prepare(model, attention.format(named), **keywords) as prepared:
            assert str(prepared.policy) == attention.format(runs)
            options = prepared.cache().layers[0].store.options
        assert (options.center, options.hadamard) == (".center" in runs, ".hadamard" in runs)
    assert not caplog.records
    with prepare(model, attention.format("")) as prepared:
        assert str(prepared.policy) == attention.format("")
        options = prepared.cache().layers[0].store.options
    assert (options.center, options.hadamard) == (False, False)
    (said,) = caplog.records
    assert "write scores=int8.center.hadamard for that" in said.getMessage()


def test_named_policies_rotate_only_heads_of_a_power_of_two(tokens, caplog):
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    with prepare(model, decoding.FAST) as prepared:
        generated(model, tokens(1, 7))
    assert str(prepared.policy) == decoding.FAST.replace(".hadamard", "")
    assert "keys aren't rotated, since the head size is no power of two" in caplog.text
    with pytest.raises(ValueError, match="power of two"), prepare(model, decoding.FAST, hadamard=True):
        generated(model, tokens(1, 7))


@pytest.mark.parametrize("policy", ["ps4+strict:0.1", "qkv=mxfp4", "scores=int8, values=int8, norm=ps4"])
def test_only_what_kernels_run_is_prepared(build, policy):
    model = build("llama")
    with pytest.raises(ValueError, match=r"has no decoding kernel.* the nearest policy that runs is"):
        prepare(model, policy)
    assert is_untouched(model)
