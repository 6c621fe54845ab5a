"""Weights of rules against Jacobians of whole layers, by automatic differentiation in float64.

A layer of transformers, copied to float64, runs on the input that the simulated one had, with its low-precision scores
or sums put in as variables. What moves is measured as docs/method.md and docs/sites.md define it; nothing of
torchlamp's own formulas is used.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import torchlamp.huggingface.simulated_attention as simulated
from torchlamp.evaluation.heads import choose_heads
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.policy.precision import Precision
from torchlamp.rules import RULES, Rule

FAMILIES = ("llama", "gpt2", "gemma3")
BITS, LENGTH, HEADS = 4, 6, 4


@pytest.fixture(scope="module")
def families(build):
    """With weights of norms that differ from feature to feature, and biases that aren't 0."""
    built = {name: build(name) for name in FAMILIES}
    for model in built.values():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                change = torch.randn(parameter.shape, generator=generator)
                parameter.data += change * (0.5 if "norm" in name or "ln_" in name else 0.2)
    return built


# ---- the layer in float64 ------------------------------------------------------------------------

#: The scores (1, heads, queries, keys) of the layer that runs, in the place of its own.
PUT_IN: list[Tensor] = []


def given_scores(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Causal attention over `PUT_IN`."""
    values = value.double().repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    z = PUT_IN[0].masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return (z @ values).transpose(1, 2).contiguous(), None


AttentionInterface.register("given-scores", given_scores)


@dataclass
class Seen:
    """What a run under a policy did in one layer."""

    #: Positional and keyword arguments of the layer.
    inputs: tuple[Any, dict[str, Any]] = ((), {})
    #: Scores, exact scores, weights of the rules asked for, and the choice: (heads, queries, keys).
    scores: Tensor = field(default_factory=Tensor)
    exact: Tensor = field(default_factory=Tensor)
    weights: dict[str, Tensor] = field(default_factory=dict)
    chosen: Tensor = field(default_factory=Tensor)
    #: Rotated queries and keys, float32 (heads, length, size), and the factor of their products.
    query: Tensor = field(default_factory=Tensor)
    key: Tensor = field(default_factory=Tensor)
    scaling: float = 1.0


def layers_of(model: Any) -> Any:
    return model.transformer.h if model.config.model_type == "gpt2" else model.model.layers


def next_norm(layer: Any) -> Any:
    """The norm that reads the stream after the attention."""
    for name in ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise AssertionError


def norm_weight(model: Any, norm: Any) -> Tensor:
    return norm.weight.double() + ("gemma" in model.config.model_type)


def run(
    model: Any, ids: Tensor, policy: str, rules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> list[Seen]:
    """One forward pass under the policy, and what each layer did."""
    seen = [Seen() for _ in layers_of(model)]
    attend = simulated.attend

    def recorded(query: Tensor, key: Tensor, value: Tensor, call: Any) -> Any:
        own = seen[call.layer]
        own.query, own.key, own.scaling = (
            query[0],
            key[0].repeat_interleave(HEADS // key.shape[1], 0),
            call.scaling,
        )
        return attend(query, key, value, call)

    def observe(number: int, found: Any) -> None:
        own = seen[number]
        own.scores, own.exact, own.chosen = found.tile.scores[0].clone(), found.exact[0], found.chosen[0]
        own.weights = {rule: Rule.parse(rule).weight(found.tile)[0] for rule in rules}

    def note(number: int) -> Any:
        def hook(_: Any, inputs: Any, words: Any) -> None:
            seen[number].inputs = inputs, words

        return hook

    monkeypatch.setattr(simulated, "attend", recorded)
    handles = [
        layer.register_forward_pre_hook(note(n), with_kwargs=True) for n, layer in enumerate(layers_of(model))
    ]
    with torch.no_grad(), lookahead(model, policy, observe=observe):
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    monkeypatch.setattr(simulated, "attend", attend)
    return seen


def doubled(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(doubled, x))
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def stream_jacobian(model: Any, number: int, seen: Seen) -> Tensor:
    """||g d(stream)|| / ||g stream|| for each score: what the next norm reads, per unit of error, float64.

    g is the norm's weight, and a LayerNorm reads the stream without its mean. A norm behind the attention keeps the
    divisor that it has at the low-precision scores.
    """
    own = copy.deepcopy(model).double()
    own.set_attn_implementation("given-scores")
    layer = layers_of(own)[number]
    reads = next_norm(layer)
    g = norm_weight(own, reads)
    centred = model.config.model_type == "gpt2"
    (stream, *others), words = seen.inputs
    if "gemma" in model.config.model_type:
        after = layer.post_attention_layernorm

        def frozen(x: Tensor) -> Tensor:
            return x / (x.detach().square().mean(-1, keepdim=True) + after.eps).sqrt() * (1 + after.weight)

        after.forward = frozen

    def read(x: Tensor) -> Tensor:
        return g * (x - x.mean(dim=-1, keepdim=True) if centred else x)

    def moved(scores: Tensor) -> Tensor:
        PUT_IN[:] = [scores[None]]
        caught: list[Tensor] = []
        handle = reads.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        layer(doubled(stream), *doubled(tuple(others)), **{k: doubled(v) for k, v in words.items()})
        handle.remove()
        return read(caught[0])[0]

    jacobian = torch.autograd.functional.jacobian(
        moved, seen.scores.double()
    )  # query, feature, head, query, key
    size = read(stream.double())[0].norm(dim=-1).detach()
    found = jacobian.norm(dim=1) / size[:, None, None, None]
    own_rows = found[torch.arange(LENGTH), :, torch.arange(LENGTH)]  # query, head, key
    assert torch.count_nonzero(found) == torch.count_nonzero(own_rows)  # a score moves its own row alone
    return own_rows.transpose(0, 1)


def rounded(x: Tensor) -> Tensor:
    """To BITS stored mantissa bits, nearest even."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2 ** (BITS + 1)).round() / 2 ** (BITS + 1), exponent)


def rounding_errors(seen: Seen) -> dict[str, Tensor]:
    """Expected errors of each score: from its own partial sums, and from norms and the finished sum alone."""
    q, k = seen.query.double(), seen.key.double()
    size = q.shape[-1]
    total, squares = (
        torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    for step in range(size):
        total = rounded(total + q[:, :, None, step] * k[:, None, :, step])
        squares = squares + total.square()
    half_unit = 2.0 ** -(BITS + 1) / 2
    norms = q.square().sum(-1)[:, :, None] * k.square().sum(-1)[:, None, :]
    finished = seen.scores.double() / seen.scaling
    return {
        "running": half_unit * squares.sqrt() * abs(seen.scaling),
        "bridge": half_unit * (size * finished.square() / 3 + norms / 6).sqrt() * abs(seen.scaling),
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["running", "bridge"])
def test_what_the_residual_rules_weigh(families, name, kind, tokens, monkeypatch):
    model, rule = families[name], f"{kind}-residual"
    seen = run(model, tokens(1, LENGTH), f"ps{BITS}+{rule}:0.002", (f"{rule}:1",), monkeypatch)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(HEADS, -1, -1)
    for number, own in enumerate(seen):
        expected = (stream_jacobian(model, number, own) * rounding_errors(own)[kind])[visible]
        found = own.weights[f"{rule}:1"].double()[visible]
        # Distances are formed in float32 as ||v||^2 - 2 v.o + ||o||^2, which cancels where v is nearly o.
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=2e-5)
        clear = (expected / 0.002 - 1).abs() > 2e-2
        assert torch.equal(own.chosen[visible][clear], (expected > 0.002)[clear])
        assert clear.float().mean() > 0.9
        assert 0 < (expected > 0.002).sum() < expected.numel()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_heads_that_are_chosen_disturb_the_stream_most(families, name, tokens, monkeypatch):
    """Harm of a head: the sum of the squares of what each score's true error does to the stream, per score."""
    model, ids = families[name], tokens(1, LENGTH)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    harm = {}
    for number, own in enumerate(run(model, ids, f"ps{BITS}+oracle-residual:1e30", (), monkeypatch)):
        moves = stream_jacobian(model, number, own) * (own.scores - own.exact).double().abs()
        per_head = (moves.square() * visible).sum(dim=(1, 2))
        harm |= {(number, head): float(value) for head, value in enumerate(per_head)}
    order = sorted(harm, key=lambda at: harm[at], reverse=True)
    for count in (1, 3, 6):
        chosen = choose_heads(model, ids, f"ps{BITS}", (count + 0.5) / len(harm))
        assert chosen.heads == frozenset(order[:count])


# ---- linear sites --------------------------------------------------------------------------------


def tiles_of(model: Any, site: str, ids: Tensor, rule: str) -> tuple[list[Any], list[dict[str, Tensor]]]:
    """The tiles that a rule was shown at a site, layer by layer, and the inputs of each layer's linear modules."""
    tiles: list[Any] = []

    class Watching(RULES[rule]):  # type: ignore[misc]
        def select(self, tile: Any) -> Tensor:
            tiles.append(tile)
            return super().select(tile)

    inputs: list[dict[str, Tensor]] = [{} for _ in layers_of(model)]
    handles = []
    for number, layer in enumerate(layers_of(model)):
        for name, module in layer.named_modules():

            def hook(_: Any, given: Any, number: int = number, name: str = name) -> None:
                inputs[number][name] = given[0].detach()[0] if given else torch.empty(0)

            if not list(module.children()):
                handles.append(module.register_forward_pre_hook(hook))
    policy = Policy(sites={site: SitePolicy(Precision.parse(f"ps{BITS}"), Watching(1e30))})
    with torch.no_grad(), lookahead(model, policy):
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return tiles, inputs


def mlp_parts(model: Any, layer: Any) -> tuple[list[Any], Any, Any, Tensor]:
    """Modules of the up projection (gate first), their names' prefix, the activation, W of the down projection."""
    mlp = layer.mlp
    if model.config.model_type == "gpt2":
        return [mlp.c_fc], "mlp.c_fc", mlp.act, mlp.c_proj.weight.double().T
    return [mlp.gate_proj, mlp.up_proj], "mlp.gate_proj", mlp.act_fn, mlp.down_proj.weight.double()


def weights_of(model: Any, module: Any) -> tuple[Tensor, Tensor]:
    """(outputs, inputs) and bias (outputs,), float64."""
    w = module.weight.detach().double()
    w = w.T if model.config.model_type == "gpt2" else w
    bias = getattr(module, "bias", None)
    return w, torch.zeros(len(w), dtype=torch.float64) if bias is None else bias.detach().double()


@pytest.mark.parametrize("name", FAMILIES)
def test_condition_is_the_condition_number_of_the_activation_by_the_weights(families, name, tokens):
    """sum over k of |d h_j / d w_jk| |w_jk|, and of the bias, over |h_j|: relative change by relative changes."""
    model = families[name]
    tiles, inputs = tiles_of(model, "mlp_up", tokens(1, LENGTH), "condition")
    for layer, tile, given in zip(layers_of(model), tiles, inputs, strict=True):
        modules, first, phi, _ = mlp_parts(model, layer)
        x = given[first].double()
        sums = tile.scores.double().chunk(len(modules), dim=-1)
        condition = tile.condition.double().chunk(len(modules), dim=-1)
        for place, module in enumerate(modules):
            w, bias = weights_of(model, module)
            for row in (0, LENGTH - 1):

                def h(
                    w: Tensor, bias: Tensor, row=row, place=place, x=x, sums=sums, modules=modules, phi=phi
                ) -> Tensor:
                    # The low-precision value, and the exact sum's derivative by the weights.
                    y = w @ x[row] + bias
                    y = y + (sums[place][row] - y).detach()
                    if len(modules) == 1:
                        return phi(y)
                    return phi(y) * sums[1][row] if place == 0 else phi(sums[0][row]) * y

                by_w, by_bias = torch.autograd.functional.jacobian(h, (w, bias))
                change = (by_w.abs() * w.abs()).sum(dim=(1, 2)) + (by_bias.abs() * bias.abs()).sum(dim=1)
                expected = change / h(w, bias).abs()
                # An activation that is flat in float32 doesn't react, and needs no accuracy.
                flat = condition[place][row] == 0
                assert not (flat & (h(w, bias).abs() > 1e-6)).any()
                torch.testing.assert_close(
                    condition[place][row][~flat], expected[~flat], rtol=1e-3, atol=1e-4
                )


@pytest.mark.parametrize("name", FAMILIES)
def test_output_is_the_change_of_the_mlps_output_by_the_bound_of_the_error(families, name, tokens):
    """||d o / d y_j|| (sum of |w_jk x_k| + |b_j|), over the root mean square of ||o|| with random signs in its sum."""
    model = families[name]
    tiles, inputs = tiles_of(model, "mlp_up", tokens(1, LENGTH), "output")
    for layer, tile, given in zip(layers_of(model), tiles, inputs, strict=True):
        modules, first, phi, down = mlp_parts(model, layer)
        x = given[first].double()
        bounds = torch.cat(
            [x.abs() @ w.abs().T + b.abs() for w, b in (weights_of(model, module) for module in modules)], -1
        )

        def hidden(y: Tensor, modules=modules, phi=phi) -> Tensor:
            return phi(y) if len(modules) == 1 else phi(y.chunk(2)[0]) * y.chunk(2)[1]

        signs = (
            torch.randint(0, 2, (4000, down.shape[1]), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        )
        for row in (0, LENGTH - 1):
            y = tile.scores[row].double()
            moves = torch.autograd.functional.jacobian(lambda y, down=down: down @ hidden(y), y).norm(dim=0)
            sizes = (signs.double() * hidden(y)) @ down.T
            size = sizes.square().sum(dim=-1).mean().sqrt()
            weight = (tile.gain * tile.numerator)[row].double()
            expected = moves * bounds[row] / size
            torch.testing.assert_close(weight, expected, rtol=0.05, atol=1e-6)  # the signs are a sample
            ratio = (weight / expected)[expected > 1e-3 * expected.max()]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)


def in_double(model: Any, norm: Any, x: Tensor) -> Tensor:
    g = norm_weight(model, norm)
    if model.config.model_type == "gpt2":
        return torch.nn.functional.layer_norm(x, g.shape, g, norm.bias.double(), norm.eps)
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return torch.nn.functional.rms_norm(x, g.shape, g, eps)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gain_of_norm_is_that_of_each_norm_of_the_stream(families, name, tokens):
    """Both norms of each layer and the final one, at the rounded stream that the layer saw."""
    model = families[name]
    tiles, inputs = tiles_of(model, "norm", tokens(1, LENGTH), "strict")
    first = {"gpt2": "ln_1"}.get(name, "input_layernorm")
    norms = []
    for layer, given in zip(layers_of(model), inputs, strict=True):
        names = {id(module): place for place, module in layer.named_modules()}
        norms += [(norm, given[names[id(norm)]]) for norm in (getattr(layer, first), next_norm(layer))]
    assert len(tiles) == len(norms) + 1
    norms.append((model.transformer.ln_f if name == "gpt2" else model.model.norm, None))
    for tile, (norm, given) in zip(tiles, norms, strict=True):
        x = tile.scores.reshape(LENGTH, -1).double()
        if given is not None:
            assert torch.equal(x, rounded(given.double()))
        for row in range(LENGTH):
            jacobian = torch.autograd.functional.jacobian(lambda x, n=norm: in_double(model, n, x), x[row])
            expected = jacobian.norm(dim=0) / in_double(model, norm, x[row]).norm()
            found = tile.gain.reshape(LENGTH, -1)[row].double()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_gain_of_qkv_is_the_relative_change_of_a_heads_rotated_vector(families, name, tokens):
    model = families[name]
    tiles, _ = tiles_of(model, "qkv", tokens(1, LENGTH), "strict")
    cos = sin = None
    if name == "llama":
        cos, sin = (a[0].double() for a in model.model.rotary_emb(torch.zeros(1), torch.arange(LENGTH)[None]))
    for tile in tiles:
        y = tile.scores.double()
        heads = y.shape[-1] // 8
        turned = heads - (0 if cos is None else 2)  # llama's two value heads aren't rotated
        for row in (1, LENGTH - 1):
            for head in range(heads):

                def vector(v: Tensor, row=row, head=head, turned=turned) -> Tensor:
                    if cos is None or sin is None or head >= turned:
                        return v
                    return v * cos[row] + torch.cat([-v[4:], v[:4]]) * sin[row]

                part = slice(8 * head, 8 * head + 8)
                jacobian = torch.autograd.functional.jacobian(vector, y[row, part])
                expected = jacobian.norm(dim=0) / vector(y[row, part]).norm()
                torch.testing.assert_close(tile.gain[row, part].double(), expected, rtol=1e-4, atol=0)
