"""All sites of a decoder: where they are found, what runs there, and that nothing is left behind."""

import pytest
import torch
import transformers
from site_models import MIXED, everywhere

import torchlamp
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.huggingface.site_forwards import plain
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.fit import shows
from torchlamp.policy.sites import SITES
from torchlamp.rules import RULES, Rule

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("site", [*SITES, "all"])
def test_float32_accumulators_and_full_recomputation_are_the_model(family, site, tokens):
    ids = tokens(2, 9)
    before = family(ids).logits
    for policy in ("ps23+none", "fp32+none", "ps3+all"):
        spelling = everywhere(policy) if site == "all" else f"{site}={policy}"
        with lookahead(family, spelling) as stats:
            torch.testing.assert_close(family(ids).logits, before, rtol=1e-4, atol=1e-5)
        assert list(stats.by_site) == (list(SITES) if site == "all" else [site])
        assert set(stats.by_site.values()) == {1.0 if policy == "ps3+all" else 0.0}
    with lookahead(family, everywhere("ps3+none") if site == "all" else f"{site}=ps3+none"):
        assert (family(ids).logits - before).abs().max() > 1e-2
    assert torch.equal(family(ids).logits, before)


@pytest.mark.parametrize("site", ["scores", "qkv", "attention_out", "mlp_up", "mlp_down", "lm_head"])
@pytest.mark.parametrize("changes", ["center.sort", "smooth.balance", "center.hadamard"])
def test_transforms_are_exact_where_everything_is_recomputed(family, site, changes, tokens):
    ids = tokens(2, 9)
    before = family(ids).logits
    sizes = {"scores": 8, "mlp_down": 48}
    if "hadamard" in changes and sizes.get(site, 32) & (sizes.get(site, 32) - 1):
        changes = changes.replace("hadamard", "sort")
    for precision in ("ps3", "int4@ps5", "int4", "fp32"):
        rule = "none" if precision == "fp32" else "all"
        with lookahead(family, f"{site}={precision}.{changes}+{rule}"):
            torch.testing.assert_close(family(ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site", ["qkv", "attention_out", "mlp_up", "mlp_down", "lm_head"])
def test_stored_weights_in_a_calibrated_representative(family, site, tokens):
    ids = tokens(1, 30)
    policy = f"{site}=int4.center.smooth"
    before = family(ids).logits
    calibration = torchlamp.calibrate(family, tokens(3, 30, seed=4), policy)
    errors = {}
    for name, spelling in (("plain", f"{site}=int4"), ("changed", policy)):
        with lookahead(family, spelling, calibration=calibration):
            errors[name] = float((family(ids).logits - before).norm())
        with lookahead(family, spelling, calibration=calibration), torch.no_grad():
            again = float((family(ids).logits - before).norm())
        assert again == errors[name]
    assert 0 < errors["changed"] != errors["plain"]


class Watch:
    """What goes into some modules and comes out of them."""

    def __init__(self, modules):
        self.seen = {}
        self.handles = [m.register_forward_hook(self._hook) for m in modules]

    def _hook(self, module, inputs, output):
        self.seen[module] = (inputs[0].detach().clone(), output.detach().clone())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def low_output(module, x, accumulator):
    transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
    matrix = module.weight if transposed else module.weight.T
    y = torchlamp.matmul(x.reshape(-1, x.shape[-1]), matrix, accumulate=accumulator).view(*x.shape[:-1], -1)
    return y if module.bias is None else torchlamp.round_to(y + module.bias, accumulator)


def modules_of(model, site):
    sites = Sites(model)
    if not SITES[site].place.in_layers:
        return sites.modules(SITES[site])
    return [module for layer in sites.layers for module in sites.modules(SITES[site], layer)]


@pytest.mark.parametrize("site", ["qkv", "attention_out", "mlp_up", "mlp_down", "lm_head"])
def test_the_low_pass_of_linear_layers(family, site, tokens):
    modules = modules_of(family, site)
    others = [m for s in ("qkv", "mlp_down") if s != site for m in modules_of(family, s)]
    with lookahead(family, f"{site}=ps5+none"), Watch([*modules, *others]) as watch:
        family(tokens(2, 5))
    assert set(watch.seen) == {*modules, *others}
    for module in modules:
        x, y = watch.seen[module]
        assert torch.equal(y, low_output(module, x, "ps5"))
    for module in others:
        x, y = watch.seen[module]
        torch.testing.assert_close(y, low_output(module, x, "fp32"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("site", ["attention_out", "mlp_down"])
def test_selection_behind_the_residual_sum(families, name, site, tokens):
    """By Jacobians of the norm module itself, at the residual sum that it reads or at the sublayer's output alone."""
    model = families[name]
    sites = Sites(model)
    number = 0 if site == "attention_out" or name == "gemma3" else 1
    layer = sites.layers[number]
    (module,) = sites.modules(SITES[site], layer)
    if name == "gemma3":
        norm = layer.post_attention_layernorm if site == "attention_out" else layer.post_feedforward_layernorm
    elif site == "attention_out":
        norm = sites.norms(layer).mlp[1]
    else:
        norm = sites.final_norm()
    with lookahead(model, f"{site}=ps3+none", layers=[number]), Watch([module, norm]) as low:
        model(tokens(1, 4))
    with lookahead(model, f"{site}=ps3+strict:0.08", layers=[number]) as stats, Watch([module]) as mixed:
        model(tokens(1, 4))
    x, delta = low.seen[module]
    total = low.seen[norm][0]  # what the norm reads at the low pass: residual + Delta, or Delta alone
    weight = torch.empty_like(delta)
    for i in range(4):
        J = torch.autograd.functional.jacobian(plain(norm), total[0, i])
        weight[0, i] = J.norm(dim=0) / plain(norm)(total[0, i][None]).norm() * delta[0, i].abs()
    expected = torch.where(weight > 0.08, low_output(module, x, "fp32"), delta)
    torch.testing.assert_close(mixed.seen[module][1], expected, rtol=1e-6, atol=1e-6)
    assert stats.selected == int((weight > 0.08).sum())
    assert 0 < stats.selected < stats.eligible


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_norms_read_rounded_sums_and_the_stream_stays(families, name, tokens):
    model = families[name]
    sites = Sites(model)
    norms = [
        pair[1] for layer in sites.layers for pair in (sites.norms(layer).attention, sites.norms(layer).mlp)
    ]
    norms.append(sites.final_norm())
    with lookahead(model, "norm=ps3+none") as stats, Watch([*norms, *sites.layers]) as watch:
        model(tokens(1, 5))
    assert stats.site_counts("norm").rows.tolist() == [5 * 5]
    for norm in norms:
        x, y = watch.seen[norm]
        torch.testing.assert_close(y, plain(norm)(torchlamp.round_to(x, "ps3")))
    first, last = (watch.seen[layer][1] for layer in sites.layers)
    assert not torch.equal(first, torchlamp.round_to(first, "ps3"))
    assert torch.equal(watch.seen[norms[-1]][0], last if isinstance(last, torch.Tensor) else last[0])


def test_values(families, tokens):
    """The low sums of values against the probabilities of eager attention."""
    model = families["llama"]
    layer = model.model.layers[0].self_attn
    ids = tokens(1, 7)
    weights = model(ids, output_attentions=True).attentions[0][0]
    with Watch([layer.v_proj]) as watch:
        model(ids)
    value = watch.seen[layer.v_proj][1][0].view(7, 2, 8).transpose(0, 1).repeat_interleave(2, dim=0)
    with lookahead(model, "values=ps4+none"), Watch([layer.o_proj]) as watch:
        model(ids)
    expected = torchlamp.matmul(weights, value, accumulate="ps4").transpose(0, 1).reshape(7, -1)
    # Probabilities agree to rounding only, which now and then is a rounding of ps4.
    off = (watch.seen[layer.o_proj][0][0] != expected).float().mean()
    assert off < 0.02


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_every_rule_at_every_site_that_shows_what_it_needs(families, name, site, tokens):
    model, ids = families[name], tokens(1, 6)
    for rule in RULES.values():
        spelling = f"{site}=ps3+{rule.examples[0]}"
        if Rule.parse(rule.examples[0]).looks_through in shows(site, False):
            with lookahead(model, spelling) as stats:
                assert model(ids).logits.isfinite().all()
            assert stats.sites == [site]
            assert 0 <= stats.recompute_rate <= 1
        else:
            with pytest.raises(ValueError, match=f"can't run at the site {site}.*: it looks through"):
                lookahead(model, spelling).__enter__()


@pytest.mark.parametrize(
    "policy", [MIXED, everywhere("ps4+random:0.3"), everywhere("ps4+random-like:strict:0.1")]
)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_results_do_not_depend_on_the_batch(families, name, policy, tokens):
    model, ids = families[name], tokens(3, 12)
    with lookahead(model, policy, seed=3) as together:
        whole = model(ids).logits
    with lookahead(model, policy, seed=3) as alone:
        pieces = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-4)
    for site in SITES:
        assert together.site_counts(site).table.tolist() == alone.site_counts(site).table.tolist(), site
        assert 0 < together.by_site[site] < 1, site


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_is_one_forward(families, name, cache, tokens):
    """Token by token, with a policy at every site; longer than a sliding window.

    A wide accumulator: one ulp of a float32 softmax may be a whole rounding of a narrow one.
    """
    model, ids, policy = families[name], tokens(2, 10), everywhere("ps23+strict:0.1")
    with lookahead(model, policy) as once:
        whole = model(ids).logits
    past = transformers.DynamicCache(config=model.config)
    if cache == "static":
        past = transformers.StaticCache(config=model.config, max_cache_len=16)
    with lookahead(model, policy) as stepwise:
        pieces = [ids[:, :4], *ids[:, 4:].split(1, dim=1)]
        parts = [model(piece, past_key_values=past, use_cache=True).logits for piece in pieces]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    for site in SITES:
        assert once.site_counts(site).table.tolist() == stepwise.site_counts(site).table.tolist(), site
    # Decoded tokens are counted at their own positions.
    assert once.position_counts().table.tolist() == stepwise.position_counts().table.tolist()


def test_padding_changes_no_logit(families, tokens):
    for name in ("llama", "gemma3", "gpt2"):
        model, ids = families[name], tokens(2, 9)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with lookahead(model, MIXED):
            padded = model(ids, attention_mask=mask, position_ids=positions).logits
            alone = model(ids[1:, 4:]).logits
        torch.testing.assert_close(padded[1:, 4:], alone, rtol=1e-4, atol=1e-4)


def test_generate(families, tokens):
    for name in ("llama", "gemma3", "gpt2"):
        model, ids = families[name], tokens(1, 5)
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
        with lookahead(model, everywhere("fp32+strict:0.1")) as stats:
            assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
        # The LM head gets the rows that it is asked for: one a step.
        assert int(stats.site_counts("lm_head").rows) == 6
        assert int(stats.site_counts("mlp_up").rows) == 2 * (5 + 5)


class TestLayers:
    def test_only_these_layers_run_narrow(self, family, tokens):
        ids, sites = tokens(1, 8), Sites(family)
        before = family(ids).logits
        with (
            lookahead(family, everywhere("ps3+none"), layers=[]) as stats,
            Watch([sites.final_norm()]) as watch,
        ):
            family(ids)
        assert stats.sites == ["lm_head"]
        with Watch([sites.final_norm()]) as plainly:
            assert torch.equal(family(ids).logits, before)
        one, other = (w.seen[sites.final_norm()][1] for w in (watch, plainly))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

        inner = ", ".join(f"{site}=ps3+all" for site in SITES if site != "lm_head")
        with lookahead(family, inner, layers=[1]) as stats:
            family(ids)
        assert stats.by_layer == [0.0, 1.0]
        with lookahead(family, inner) as both:
            family(ids)
        assert both.by_layer == [1.0, 1.0]
        assert both.eligible > stats.eligible > both.eligible / 3

    def test_the_first_layer_of_scores(self, llama, tokens):
        """One narrow layer: its input is exact, and everything before it is as in the model."""
        ids = tokens(1, 8)
        with Watch([llama.model.layers[0]]) as plainly:
            llama(ids)
        with lookahead(llama, "ps2+none", layers=[1]) as stats, Watch(list(llama.model.layers)) as watch:
            llama(ids)
        first = llama.model.layers[0]
        torch.testing.assert_close(watch.seen[first][1], plainly.seen[first][1], rtol=1e-4, atol=1e-5)
        assert [len(heads) for heads in stats.by_head] == [4, 4]
        assert stats.head_counts(0).rows.sum() == 0
        assert stats.head_counts(1).rows.sum() == 4 * 8

    @pytest.mark.parametrize("layers", [[2], [-1, 0]])
    def test_a_layer_that_is_not_there(self, llama, layers):
        with pytest.raises(ValueError, match=r"layers=\[-?\d\]: the model has the layers 0 to 1"):
            lookahead(llama, "ps4+none", layers=layers).__enter__()


def test_a_softcap_of_the_final_logits_counts():
    """Where the cap flattens, an error weighs less and nothing is recomputed."""
    sites = {}
    for softcap in (None, 0.5):
        torch.manual_seed(0)
        config = transformers.Gemma3TextConfig(
            vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, initializer_range=0.6, final_logit_softcapping=softcap,
        )  # fmt: skip
        model = transformers.Gemma3ForCausalLM(config).eval()
        with lookahead(model, "lm_head=ps4+strict:0.2") as stats:
            model(torch.arange(2, 20)[None])
        sites[softcap] = stats.recompute_rate
    assert sites[None] > 0.005
    assert sites[0.5] < sites[None] / 4


def test_the_policy_of_the_design_parses_and_runs(llama, tokens):
    policy = torchlamp.Policy.parse("scores=ps4+strict:0.1, mlp_up=ps7+condition:4")
    assert str(policy) == "scores=ps4+strict:0.1, mlp_up=ps7+condition:4"
    with lookahead(llama, policy) as stats:
        llama(tokens(1, 9))
    assert list(stats.by_site) == ["scores", "mlp_up"]
    assert stats.eligible == sum(int(stats.site_counts(s).eligible) for s in stats.sites)
    assert "entries at scores, mlp_up" in str(stats)
    assert Rule.parse("condition:4").looks_through == "elementwise"
