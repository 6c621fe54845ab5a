"""Stored operands over whole windows, against the readable forms of the decoding kernels, one step at a time."""

import pytest
import torch
from torch.nn.functional import silu

from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.transforms.bicenter import Bicenter
from torchlamp.arithmetic.transforms.center import Centred
from torchlamp.arithmetic.transforms.chain import fit, moments_of
from torchlamp.arithmetic.transforms.hadamard import Rotated
from torchlamp.decoding.head import LowBitHead
from torchlamp.decoding.mlp import LowBitMlp
from torchlamp.kernels import reference_decoding, reference_lowbit
from torchlamp.kernels.low_bit_matrix import LowBitMatrix
from torchlamp.rules.rule import Rule
from torchlamp.simulation.linear import relative
from torchlamp.simulation.linear_sums import Weights
from torchlamp.simulation.stored import QuantisedMatrix, rounded_vectors, store_matrix, stored_values
from torchlamp.simulation.stored_attention import Softmax, StoredKeys, StoredValues, stored_sums, weigh
from torchlamp.simulation.stored_linear import (
    StoredVocabulary,
    StoredWeights,
    for_the_top,
    stored_linears,
)
from torchlamp.simulation.stored_mlp import Neurons, OutputSize, StoredColumns, stored_down, stored_neurons

HEADS, GROUPS, KEYS, SIZE = 4, 2, 40, 32


def changes(mean, rotated):
    """What keys less a mean, and rotated, went through."""
    centred = [] if mean is None else [Centred(mean, "right")]
    return [*centred, Rotated()] if rotated else centred


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("name", ["int4", "int8", "int12"])
@pytest.mark.parametrize("shape", [(5, 40), (33, 64), (2, 3, 7)])
def test_stored_values_are_the_kernels_copies(name, shape):
    x, operand = draw(*shape), Operand.parse(name)
    rows = x.reshape(-1, shape[-1])
    packed = LowBitMatrix.pack(rows, operand.kernel_bits)
    assert torch.equal(stored_values(x, operand), packed.dequantised().reshape(shape))
    plain = QuantisedMatrix.store(rows, operand)
    assert torch.equal(plain.dequantised(), packed.dequantised())
    torch.testing.assert_close(plain.errors, packed.errors, rtol=2e-7, atol=0)
    assert (plain.errors.double() >= (rows - plain.values).double().norm(dim=1)).all()


@pytest.mark.parametrize("name", ["int4", "int8", "int12"])
def test_any_stored_matrix_has_the_kernels_products(name):
    weight, x, operand = draw(50, 70), draw(9, 70, seed=1), Operand.parse(name)
    kernel = store_matrix(weight, operand)
    assert isinstance(kernel, LowBitMatrix)
    plain = QuantisedMatrix.store(weight, operand)
    torch.testing.assert_close(plain.products(x), kernel.products(x), rtol=1e-5, atol=2e-5)


def test_vectors_are_rounded_to_sixteen_bits_of_their_group():
    x = draw(3, 5, 40)
    error = (rounded_vectors(x) - x).abs()
    largest = torch.nn.functional.pad(x, (0, 24)).view(3, 5, 2, 32).abs().amax(-1, keepdim=True)
    bounds = (largest / 32767 * 0.502).expand(-1, -1, -1, 32).flatten(-2)[..., :40]
    assert (error <= bounds).all()
    assert error.max() > 0


def one_step(q, keys, values, row, *, operands, mean, rotated, rules, softcap, sinks, visible):
    """The decoding kernel's readable form for one row of one sample."""
    stored = StoredKeys.store(keys, operands[0], changes(mean, rotated))
    limits = [-1.0 if r == "all" else torch.inf if r == "none" else float(r.split(":")[1]) for r in rules]
    return reference_decoding.attend(
        q[None, :, row : row + 1],
        stored.low[None],
        stored.errors[None],
        stored_values(values, operands[1])[None],
        keys[None],
        values[None],
        mean=None if mean is None else mean[None],
        rotated=rotated,
        seen=visible[None, row : row + 1],
        sinks=sinks,
        scaling=0.3,
        softcap=softcap or 0.0,
        scores_threshold=limits[0],
        values_threshold=limits[1],
    )


@pytest.mark.parametrize("rules", [("none", "none"), ("all", "all"), ("running:0.01", "topz:0.03")])
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize(("center", "rotated"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (2.0, True)])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_a_window_of_attention_is_the_steps_of_decoding(
    rules, bits, center, rotated, softcap, with_sinks, scale
):
    q, keys, values = (
        draw(HEADS, KEYS, SIZE, seed=1, scale=scale),
        draw(GROUPS, KEYS, SIZE, seed=2),
        draw(GROUPS, KEYS, SIZE),
    )
    keys[:, :, 3] += 5.0
    operand = Operand.parse(bits)
    mean = keys.mean(1) if center else None
    sinks = torch.tensor([0.0, 1.0, -1.0, 2.0]) if with_sinks else None
    visible = torch.ones(KEYS, KEYS, dtype=torch.bool).tril()
    visible[:, :2] = False  # padding: the first two rows see nothing
    stored = StoredKeys.store(keys, operand, changes(mean, rotated))
    scores, error = stored.scores(q, 0, KEYS, 0.3)
    weighed = weigh(
        scores, error, q, keys.transpose(1, 2), visible[None], Softmax(softcap, None, sinks),
        rule=Rule.parse(rules[0]), scaling=0.3,
    )  # fmt: skip
    how = StoredValues(operand, Rule.parse(rules[1]))
    out, counts = stored_sums(weighed, values, stored_values(values, operand), how)
    rows_done_in_full = 0
    for row in range(2, KEYS):
        want, again, large = one_step(
            q, keys, values, row, operands=(operand, operand), mean=mean, rotated=rotated, rules=rules,
            softcap=softcap, sinks=sinks, visible=visible,
        )  # fmt: skip
        torch.testing.assert_close(out[:, row], want[0, 0], rtol=1e-4, atol=1e-5)
        assert weighed.chosen[:, row].sum(-1).tolist() == again[0, :, 0].tolist()
        assert counts[:, row].tolist() == large[0, :, 0].tolist()
        rows_done_in_full += int(weighed.misled[:, row].sum())
    if scale == 6.0 and bits == "int4" and rules[0] == "running:0.01" and not center and softcap is None:
        assert rows_done_in_full > 0


def test_errors_beyond_a_nat_raise_the_weight():
    q, keys = draw(HEADS, 3, SIZE, scale=20), draw(GROUPS, KEYS, SIZE, seed=1)
    scores, error = StoredKeys.store(keys, Operand.parse("int4")).scores(q, 0, KEYS, 1.0)
    assert (error > 1).all()
    visible = torch.ones(1, 1, 1, dtype=torch.bool).expand(1, 3, KEYS)
    far = weigh(
        scores,
        error,
        q,
        keys.transpose(1, 2),
        visible,
        Softmax(),
        rule=Rule.parse("running:0.1"),
        scaling=1.0,
    )
    z = scores.softmax(-1)
    assert far.chosen.sum() > (2 * z * (1 - z) * error > 0.1).sum()


def test_values_that_are_not_finite_are_read_in_full():
    q, keys, values = (
        draw(HEADS, KEYS, SIZE),
        draw(GROUPS, KEYS, SIZE, seed=1),
        draw(GROUPS, KEYS, SIZE, seed=2),
    )
    values[0, 5, 3] = torch.inf
    operand = Operand.parse("int8")
    visible = torch.ones(1, 1, 1, dtype=torch.bool).expand(1, KEYS, KEYS)
    scores, error = StoredKeys.store(keys, operand).scores(q, 0, KEYS, 0.3)
    weighed = weigh(
        scores, error, q, keys.transpose(1, 2), visible, Softmax(), rule=Rule.parse("none"), scaling=0.3
    )
    out, counts = stored_sums(
        weighed, values, stored_values(values, operand), StoredValues(operand, Rule.parse("none"))
    )
    assert counts.unique().tolist() == [KEYS]
    assert out[:2, :, 3].isinf().all()
    assert out[2:].isfinite().all()


@pytest.mark.parametrize(
    "rules", [("none", "none"), ("all", "all"), ("output:0.01", "output:0.003"), ("all", "none")]
)
@pytest.mark.parametrize("bits", [("int8", "int8"), ("int4", "int12")])
def test_a_window_of_an_mlp_is_the_steps_of_decoding(rules, bits):
    gate, up, down, x = (
        draw(48, 40, seed=1),
        draw(48, 40, seed=2),
        draw(32, 48, seed=3),
        draw(2, 11, 40, seed=4),
    )
    own_bits = (Operand.parse(b).kernel_bits for b in bits)
    mlp = LowBitMlp.pack(gate, up, down, "silu", *own_bits, full=torch.float32)
    limits = [-1.0 if r == "all" else torch.inf if r == "none" else float(r.split(":")[1]) for r in rules]
    want = [mlp.reference(row[None], *limits) for row in x.flatten(0, 1)]
    maps = [StoredWeights.store(Weights(w.T), Operand.parse(bits[0])) for w in (gate, up)]
    columns = StoredColumns(StoredWeights.store(Weights(down.T), Operand.parse(bits[1])))
    size = OutputSize()
    neurons = stored_neurons(
        x, maps, Neurons(silu, True, columns.norms), rule=Rule.parse(rules[0]), size=size
    )
    a, b = neurons.outputs
    result = stored_down(silu(a) * b, columns, rule=Rule.parse(rules[1]), size=size.take(22))
    torch.testing.assert_close(
        result.output.flatten(0, 1), torch.cat([w[0] for w in want]), rtol=1e-4, atol=1e-3
    )
    assert neurons.selected.flatten().tolist() == [w[1] for w in want]
    assert result.selected.flatten().tolist() == [w[2] for w in want]
    assert neurons.eligible == result.eligible == 48
    assert size.rows is None


@pytest.mark.parametrize("rule", ["none", "all", "running:0.01"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_window_of_logits_is_the_steps_of_decoding(rule, bits):
    weight, x = draw(300, 40, seed=1), draw(2, 9, 40, seed=2)
    head = LowBitHead.pack(weight, Operand.parse(bits).kernel_bits)
    limit = -1.0 if rule == "all" else torch.inf if rule == "none" else float(rule.split(":")[1])
    want = [head.reference(row[None], limit) for row in x.flatten(0, 1)]
    stored = StoredWeights.store(Weights(weight.T), Operand.parse(bits))
    result = stored_linears(
        x, [stored], rule=Rule.parse(rule), next_function=StoredVocabulary(), always=for_the_top(stored)
    )
    torch.testing.assert_close(
        result.output.flatten(0, 1), torch.cat([w[0] for w in want]), rtol=1e-5, atol=2e-5
    )
    assert result.selected.flatten().tolist() == [w[2] for w in want]


def test_rows_that_a_rule_picks_are_those_of_full_precision():
    weights, x = [Weights(draw(40, n, seed=n).contiguous(), draw(n)) for n in (30, 20)], draw(3, 7, 40)
    stored = [StoredWeights.store(w, Operand.parse("int4")) for w in weights]
    results = {
        rule: stored_linears(x, stored, rule=Rule.parse(rule), next_function=relative)
        for rule in ("none", "running:0.02", "output:0.02", "all")
    }
    exact = torch.cat([x @ w.matrix + w.bias for w in weights], -1)
    outputs = {rule: torch.cat(r.outputs, -1) for rule, r in results.items()}
    torch.testing.assert_close(outputs["all"], exact, rtol=1e-5, atol=1e-5)
    changed = outputs["running:0.02"] != outputs["none"]
    assert 0 < changed.sum() <= results["running:0.02"].selected.sum() < changed.numel()
    torch.testing.assert_close(outputs["running:0.02"][changed], exact[changed], rtol=1e-5, atol=1e-5)
    # The error is known: nothing is bounded by a condition number.
    assert torch.equal(outputs["output:0.02"], outputs["running:0.02"])
    assert results["none"].selected.sum() == 0
    assert results["all"].eligible == 50


@pytest.mark.parametrize("rule", ["running:0.02", "random:0.3"])
def test_samples_do_not_depend_on_each_other(rule):
    stored, x = [StoredWeights.store(Weights(draw(40, 30)), Operand.parse("int8"))], draw(3, 7, 40)

    def run(x):
        generator = torch.Generator().manual_seed(1)
        return stored_linears(
            x, stored, rule=Rule.parse(rule), next_function=relative, generator=generator
        ).output

    together = run(x)
    for i in range(3):
        assert torch.equal(run(x[i : i + 1])[0], together[i])


def test_reference_values_are_what_pack_gives():
    x = draw(20, 40)
    codes, scales, _ = reference_lowbit.pack_blocks(x, 8)
    assert torch.equal(
        reference_lowbit.unpack_blocks(codes, scales, 8, 20, 40), stored_values(x, Operand.parse("int8"))
    )


def test_what_columns_lack_is_given_back_to_stored_scores():
    q, keys = draw(HEADS, KEYS, SIZE, seed=1) + 2.0, draw(GROUPS, KEYS, SIZE, seed=2) + 3.0
    chain = fit([Bicenter()], *moments_of(q, keys.mT, []))
    stored = StoredKeys.store(keys, Operand.parse("int12"), chain)
    assert stored.column_shift.shape == (GROUPS, 1, KEYS)
    scores, _ = stored.scores(q, 2, KEYS, 0.3)
    exact = q @ keys.repeat_interleave(HEADS // GROUPS, 0).mT * 0.3
    torch.testing.assert_close(scores, exact[..., 2:], rtol=1e-3, atol=3e-2)
