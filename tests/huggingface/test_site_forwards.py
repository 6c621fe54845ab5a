"""Replaced forwards leave nothing behind, and what can't run is refused."""

import copy
import pickle

import pytest
import torch
import transformers
from site_models import MIXED, state
from torch import nn

import torchlamp
from torchlamp.huggingface.attached_policy import context_of
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.policy.sites import SITES

pytestmark = pytest.mark.usefixtures("no_grad")


class TestNothingIsLeftBehind:
    def test_after_the_block_and_after_an_exception(self, family, tokens):
        before, implementation = state(family), family.config._attn_implementation
        with lookahead(family, MIXED):
            family(tokens(1, 3))
        assert state(family) == before
        with pytest.raises(KeyError), lookahead(family, MIXED):
            raise KeyError
        assert state(family) == before
        assert family.config._attn_implementation == implementation

    def test_after_an_error_in_the_forward(self, llama, tokens):
        before, expected = state(llama), llama(tokens(1, 3)).logits
        with pytest.raises(IndexError), lookahead(llama, MIXED):
            llama(torch.tensor([[10**6]]))
        assert state(llama) == before
        assert torch.equal(llama(tokens(1, 3)).logits, expected)

    def test_nested_blocks(self, llama, tokens):
        ids, plain_logits = tokens(1, 6), llama(tokens(1, 6)).logits
        with lookahead(llama, "mlp_up=ps3+none, norm=ps4+none") as outer:
            coarse, counted = llama(ids).logits, outer.eligible
            with lookahead(llama, "mlp_down=ps23+none") as inner:
                torch.testing.assert_close(llama(ids).logits, plain_logits, rtol=1e-4, atol=1e-5)
            assert (inner.sites, outer.eligible) == (["mlp_down"], counted)
            with lookahead(llama, "ps23+none"):
                torch.testing.assert_close(llama(ids).logits, plain_logits, rtol=1e-4, atol=1e-5)
            assert torch.equal(llama(ids).logits, coarse)
        assert torch.equal(llama(ids).logits, plain_logits)

    def test_scores_outside_are_not_those_inside(self, llama, tokens):
        """The innermost policy runs alone: without scores in it, attention is float32."""
        ids, plain_logits = tokens(1, 6), llama(tokens(1, 6)).logits
        with lookahead(llama, "ps2+none") as outer:
            with lookahead(llama, "mlp_up=ps23+none") as inner:
                torch.testing.assert_close(llama(ids).logits, plain_logits, rtol=1e-4, atol=1e-5)
            assert (outer.eligible, inner.sites) == (0, ["mlp_up"])

    def test_the_models_own_attention_runs_without_scores_and_values(self, llama):
        with lookahead(llama, "mlp_up=ps4+none, norm=ps4+none, lm_head=ps4+none"):
            assert llama.config._attn_implementation == "eager"
        with lookahead(llama, "values=ps4+none"):
            assert llama.config._attn_implementation == "lamp"

    def test_a_copy_made_inside_the_block_has_its_own_modules_and_counts(self, build, tokens):
        model, ids = build("llama"), tokens(1, 5)
        with lookahead(model, MIXED) as stats:
            expected = model(ids).logits
            counted = stats.eligible
            clone = copy.deepcopy(model)
            assert torch.equal(clone(ids).logits, expected)
            assert stats.eligible == counted
            clone.model.layers[0].mlp.gate_proj.weight.mul_(2)
            assert not torch.equal(clone(ids).logits, expected)
            assert torch.equal(model(ids).logits, expected)
        torchlamp.detach(clone)
        assert not any("forward" in vars(m) or context_of(m) for m in clone.modules())

    def test_other_forwards_on_instances_stay(self, build, tokens):
        model, ids = build("llama"), tokens(1, 5)
        gate = model.model.layers[0].mlp.gate_proj
        calls = []
        own = gate.forward
        gate.forward = lambda x: calls.append(1) or own(x)
        mine = gate.forward
        with lookahead(model, "mlp_up=ps4+none"):
            model(ids)
        assert gate.forward is mine
        assert not calls
        model(ids)
        assert calls

    def test_attach_and_detach(self, build, tokens):
        model, ids = build("gemma3"), tokens(1, 6)
        expected, before = model(ids).logits, state(model)
        stats = torchlamp.attach(model, MIXED)
        model(ids)
        # All but scores and values run at once; those wait for the attention implementation.
        assert stats.sites == ["qkv", "attention_out", "mlp_up", "mlp_down", "norm", "lm_head"]
        model.set_attn_implementation("lamp")
        model(ids)
        assert stats.sites == list(SITES)
        other = torchlamp.attach(model, "mlp_up=ps3+none")
        eligible = stats.eligible
        model(ids)
        assert (stats.eligible, other.sites) == (eligible, ["mlp_up"])
        torchlamp.detach(model)
        model.set_attn_implementation("eager")
        assert torch.equal(model(ids).logits, expected)
        assert state(model) == before

    def test_state_dict_and_pickle(self, build):
        llama = build("llama")
        keys = list(llama.state_dict())
        with lookahead(llama, MIXED):
            assert list(llama.state_dict()) == keys
        assert pickle.loads(pickle.dumps(llama)).config.hidden_size == 32


class TestRefused:
    def test_names_that_are_not_known(self, build):
        model = build("gpt_oss")
        words = (
            r"GptOssForCausalLM: model.layers.0.mlp \(GptOssMLP\) is a mixture of experts that the look-ahead "
            r"doesn't know: leave out mlp_up and mlp_down"
        )
        with pytest.raises(ValueError, match=words):
            lookahead(model, "mlp_up=ps4+none").__enter__()
        assert not any("forward" in vars(m) or context_of(m) for m in model.modules())

    def test_no_decoder_layers(self):
        config = transformers.T5Config(
            vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config).eval()
        words = (
            "T5ForConditionalGeneration: no list of decoder layers found, so the sites qkv, norm can't run"
        )
        with pytest.raises(ValueError, match=words):
            lookahead(model, "qkv=ps4+none, norm=ps4+none").__enter__()

    def test_adapters_and_quantised_layers(self, build):
        model = build("llama")

        class Adapted(nn.Linear):
            pass

        model.model.layers[1].mlp.up_proj = Adapted(32, 48)
        with pytest.raises(
            ValueError, match=r"model.layers.1.mlp.up_proj is a \w+\.Adapted: only torch.nn.Linear"
        ):
            lookahead(model, "mlp_up=ps4+none").__enter__()

    def test_double_precision(self, build):
        with pytest.raises(TypeError, match=r"model.layers.0.self_attn.q_proj has weights of torch.float64"):
            lookahead(build("llama").double(), "qkv=ps4+none").__enter__()

    def test_an_unknown_norm(self, build):
        model = build("llama")

        class Halved(type(model.model.norm)):
            def forward(self, x):
                return super().forward(x) / (1 + x[..., 1:2] ** 2)

        model.model.norm.__class__ = Halved
        with pytest.raises(
            ValueError, match=r"model.norm is a Halved: the look-ahead knows RMSNorm and LayerNorm"
        ):
            lookahead(model, "norm=ps4+none").__enter__()

    def test_autocast_and_backward(self, llama, tokens):
        for site in ("qkv", "mlp_up", "norm", "lm_head"):
            with lookahead(llama, f"{site}=ps4+strict:0.1"):
                with (
                    torch.no_grad(),
                    torch.autocast("cpu"),
                    pytest.raises(TypeError, match=r"autocast|float32"),
                ):
                    llama(tokens(1, 3))
                with torch.enable_grad():
                    loss = llama(tokens(1, 3)).logits.sum()
                    with pytest.raises(RuntimeError, match="no gradient flows through look-ahead"):
                        loss.backward()

    def test_scaled_logits_and_residuals(self):
        common = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        config = transformers.GraniteConfig(**common, **heads, logits_scaling=2.0, residual_multiplier=0.5)
        model = transformers.GraniteForCausalLM(config).eval()
        with pytest.raises(ValueError, match="scales its logits"):
            lookahead(model, "lm_head=ps4+none").__enter__()
        with pytest.raises(ValueError, match="residual_multiplier"):
            lookahead(model, "mlp_down=ps4+none").__enter__()
        with lookahead(model, "mlp_up=ps4+none") as stats:
            model(torch.tensor([[1, 2]]))
        assert stats.sites == ["mlp_up"]
