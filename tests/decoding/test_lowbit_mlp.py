import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from operands import same_bits
from torchlamp.decoding.mlp import ACTIVATIONS, LowBitMlp, activate

NOTHING, EVERYTHING = float("inf"), -1.0
#: The fixtures only choose an implementation, once for all examples.
over_shapes = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.integers(1, 70) | st.sampled_from([15, 16, 17, 31, 32, 33, 64, 130])
thresholds = st.sampled_from([EVERYTHING, 0.0, 1e-4, 1e-3, 1e-2, NOTHING])
activations = st.sampled_from(ACTIVATIONS)


@pytest.fixture(autouse=True)
def one_thread():
    """MLPs this small only lose by being shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(neurons, columns, outputs, seed=0):
    """Gate, up and down, some neurons a hundred times as important as others."""
    g = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, neurons, columns, generator=g) / columns**0.5
    down = torch.randn(outputs, neurons, generator=g) / neurons**0.5
    return gate, up, down * torch.randn(neurons, generator=g).mul(2).exp()


def vectors(count, columns, seed=0):
    return 2 * torch.randn(count, columns, generator=torch.Generator().manual_seed(seed + 77))


def phi(name, a):
    return functional.silu(a) if name == "silu" else functional.gelu(a, approximate="tanh")


def exact(gate, up, down, name, x):
    """The MLP in the precision of `x`, and the sums of its terms' magnitudes."""
    gate, up, down = (w.to(x.dtype) for w in (gate, up, down))
    h = phi(name, x @ gate.T) * (x @ up.T)
    return h @ down.T, h.abs() @ down.abs().T


@over_shapes
@given(sizes, sizes, sizes, st.integers(1, 9), activations, st.sampled_from([4, 8, 12]), thresholds, thresholds,
       st.integers(0, 999))  # fmt: skip
def test_kernel_and_reference(
    instruction_set, neurons, columns, outputs, count, name, bits, up_threshold, down_threshold, seed
):
    matrices, x = weights(neurons, columns, outputs, seed), vectors(count, columns, seed)
    mlp = LowBitMlp.pack(*matrices, name, bits, bits)
    got, *counts = mlp.run(x, up_threshold, down_threshold)
    want, *reference_counts = mlp.reference(x, up_threshold, down_threshold)
    assert got.shape == want.shape == (count, outputs)
    # A neuron right at the threshold may fall on either side, and changes the output by its weight.
    differ = sum(abs(a - b) for a, b in zip(counts, reference_counts, strict=True))
    assert differ <= 2
    for threshold, number in zip((up_threshold, down_threshold), counts, strict=True):
        if threshold in (NOTHING, EVERYTHING):
            assert number == (0 if threshold == NOTHING else count * neurons)
    a, b = x @ mlp.gate_full.T, x @ mlp.up_full.T
    scale = ((phi(name, a) * b).abs() * mlp.norms[:neurons]).sum(1)
    # Full sums may differ in their last bits, and torch's GELU, by which `scale` is measured, takes 1 + tanh.
    cancelled = 2.0**-22 * ((a * b).abs() * mlp.norms[:neurons]).sum(1)
    # Neurons are rounded to 1/32767 of their group's largest before the down projection: on the edge, either way.
    edge = 2 / 32767 * (phi(name, a) * b).abs().amax(1) * mlp.norms.max()
    allowed = 1e-4 * scale + cancelled + edge + (differ > 0) * 0.1 * scale
    assert ((got - want).norm(dim=1) <= allowed + 1e-12).all()


@over_shapes
@given(sizes, sizes, sizes, st.integers(1, 9), activations, st.integers(0, 999))
def test_everything_recomputed_is_float64_but_for_the_float16_copy(
    implementation, neurons, columns, outputs, count, name, seed
):
    matrices, x = weights(neurons, columns, outputs, seed), vectors(count, columns, seed)
    got, *counts = LowBitMlp.pack(*matrices, name, 4, 4).run(x, EVERYTHING, EVERYTHING)
    want, magnitude = exact(*matrices, name, x.double())
    assert counts == [count * neurons] * 2
    # 2^-11 for the copy; the rest is what float32 loses in three sums and the activation.
    assert ((got - want).abs() <= (2.0**-11 + 1e-5 * columns**0.5) * magnitude + 1e-5).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_error_falls_and_counts_rise_as_the_thresholds_fall(implementation, name, bits):
    matrices, x = weights(200, 96, 64), vectors(8, 96)
    mlp = LowBitMlp.pack(*matrices, name, bits, bits)
    want, _ = exact(*matrices, name, x.double())

    def errors(pairs):
        for up, down in pairs:
            y, recomputed, read = mlp.run(x, up, down)
            yield float((y - want).norm() / want.norm()), recomputed, read

    ladder = [NOTHING, 1e-2, 3e-3, 1e-3, 1e-4, 0.0, EVERYTHING]
    for pairs, which in (([(t, EVERYTHING) for t in ladder], 1), ([(EVERYTHING, t) for t in ladder], 2)):
        results = list(errors(pairs))
        lost, numbers = [r[0] for r in results], [r[which] for r in results]
        assert numbers == sorted(numbers)
        assert numbers[0] == 0
        assert numbers[-1] == 8 * 200
        assert all(after <= 1.1 * before for before, after in itertools.pairwise(lost))
        assert lost[-1] < lost[0] / 10
        assert lost[-1] < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_look_ahead_beats_as_many_neurons_by_size(implementation, bits):
    """The flagged tenth of the neurons removes far more than a tenth of the error."""
    matrices, x = weights(400, 96, 64), vectors(1, 96)
    mlp = LowBitMlp.pack(*matrices, "silu", bits, 12)
    want, _ = exact(*matrices, "silu", x.double())
    low = (mlp.run(x, NOTHING, EVERYTHING)[0] - want).norm()
    for threshold in torch.logspace(-1, -5, 60).tolist():
        y, recomputed, _ = mlp.run(x, threshold, EVERYTHING)
        if recomputed >= 40:
            break
    assert recomputed <= 60
    assert (y - want).norm() < 0.4 * low


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "mixed"])
@pytest.mark.parametrize("pair", [(EVERYTHING, EVERYTHING), (1e-3, 1e-3), (1e-3, NOTHING), (NOTHING, 1e-3)])
def test_what_is_not_finite_gives_what_float32_gives(implementation, name, bad, pair):
    matrices, x = weights(50, 40, 20), vectors(3, 40)
    x[1, 3] = float("inf" if bad == "mixed" else bad)
    if bad == "mixed":
        x[1, 4] = -float("inf")
    mlp = LowBitMlp.pack(*matrices, name)
    got, recomputed, read = mlp.run(x, *pair)
    want, _ = exact(*matrices, name, x)
    assert torch.equal(got[1].isnan(), want[1].isnan())
    assert torch.equal(got[1].isinf(), want[1].isinf())
    assert recomputed >= 50
    assert read >= 50 or pair[1] == NOTHING
    torch.testing.assert_close(got[[0, 2]], mlp.run(x[[0, 2]], *pair)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e-10, 1e10, 1e18, 1e30])
def test_extreme_magnitudes(implementation, name, scale):
    matrices, x = weights(50, 40, 20), scale * vectors(3, 40)
    want, magnitude = exact(*matrices, name, x)
    mlp = LowBitMlp.pack(*matrices, name)
    got, recomputed, read = mlp.run(x, 1e-3, 1e-3)
    finite = magnitude.isfinite()
    if scale == 1e30:  # all overflows, in float32, too
        assert not finite.any()
        assert recomputed == read == 150
    assert ((got - want).abs() <= 2e-2 * magnitude + 1e-37)[finite].all()
    if scale == 0.0:
        assert (got == 0).all()
        assert recomputed == read == 0
    assert mlp.run(x * 0, NOTHING, NOTHING)[1:] == (0, 0)
    assert mlp.run(x * 0, EVERYTHING, EVERYTHING)[1:] == (150, 150)


@pytest.mark.parametrize("factor", [1e6, 1e-9, 1e30])
def test_down_projections_that_float16_cannot_hold_are_kept_in_float32(implementation, factor):
    gate, up, down = weights(50, 40, 20)
    x, down = vectors(3, 40), down * factor
    mlp = LowBitMlp.pack(gate, up, down, "silu")
    assert mlp.down_full.dtype == torch.float32
    assert mlp.bytes[1] == 4 * 50 * 20
    got = mlp.run(x, EVERYTHING, EVERYTHING)[0]
    torch.testing.assert_close(
        got / factor, exact(gate, up, down / factor, "silu", x)[0], rtol=1e-5, atol=1e-5
    )
    assert LowBitMlp.pack(gate, up, down / factor, "silu").down_full.dtype == torch.float16


def test_weights_that_are_not_finite(implementation):
    gate, up, down = weights(50, 40, 20)
    gate[7, 3], up[9, 5] = float("nan"), float("inf")
    x = vectors(3, 40)
    got, *_ = LowBitMlp.pack(gate, up, down, "silu").run(x, 1e-3, 1e-3)
    assert got.isnan().all()
    gate[7, 3], up[9, 5], down[4, 2] = 1.0, 1.0, float("nan")
    got, *_ = LowBitMlp.pack(gate, up, down, "silu").run(x, 1e-3, 1e-3)
    assert torch.equal(got.isnan(), torch.arange(20).eq(4).expand(3, 20))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_those_of_autograd(name):
    a = torch.linspace(-9, 9, 181, dtype=torch.float64, requires_grad=True)
    value, slope = activate(name, a)
    torch.testing.assert_close(value, phi(name, a))
    torch.testing.assert_close(slope, torch.autograd.grad(phi(name, a).sum(), a)[0])


def test_results_depend_neither_on_threads_nor_on_other_vectors(instruction_set):
    mlp, x = LowBitMlp.pack(*weights(700, 65, 70), "silu"), vectors(530, 65)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(mlp.run(x, 1e-3, 1e-3))
    for got, *counts in results[1:]:
        assert same_bits(got, results[0][0])
        assert tuple(counts) == results[0][1:]
    for some in (slice(0, 9), slice(505, 530)):
        alone, *counts = zip(*(mlp.run(v[None], 1e-3, 1e-3) for v in x[some]), strict=True)
        assert same_bits(torch.cat(alone), results[0][0][some])
        assert [sum(c) for c in counts] == list(mlp.run(x[some], 1e-3, 1e-3)[1:])
        assert all(sum(c) > 0 for c in counts)


def test_many_threads_at_once(instruction_set):
    mlps = [LowBitMlp.pack(*weights(n, 65, 70, n), "gelu_tanh") for n in (40, 300)]
    inputs = [vectors(n, 65, n) for n in (1, 5)]
    jobs = [(mlp, x) for mlp in mlps for x in inputs] * 10
    want = [mlp.run(x, 1e-3, 1e-3) for mlp, x in jobs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda job: job[0].run(job[1], 1e-3, 1e-3), jobs))
    for one, other in zip(got, want, strict=True):
        assert same_bits(one[0], other[0])
        assert one[1:] == other[1:]


def test_copies_and_pickles(implementation):
    mlp, x = LowBitMlp.pack(*weights(50, 40, 20), "silu", 12, 4), vectors(3, 40)
    want = mlp.run(x, 1e-3, 1e-3)
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        got = other.run(x, 1e-3, 1e-3)
        assert same_bits(got[0], want[0])
        assert got[1:] == want[1:]


def test_strides_and_empty_sizes(implementation):
    gate, up, down = weights(50, 40, 20)
    x = vectors(3, 40)
    want = LowBitMlp.pack(gate, up, down, "silu").run(x, 1e-3, 1e-3)[0]
    turned = [w.T.contiguous().T for w in (gate, up, down)]
    spread = torch.zeros(3, 80)[:, ::2].copy_(x)
    assert same_bits(LowBitMlp.pack(*turned, "silu").run(spread, 1e-3, 1e-3)[0], want)
    for n, k, m, count in [(0, 40, 20, 3), (50, 0, 20, 3), (50, 40, 0, 3), (50, 40, 20, 0)]:
        mlp = LowBitMlp.pack(gate[:n, :k], up[:n, :k], down[:m, :n], "silu")
        y = mlp.run(x[:count, :k], 1e-3, 1e-3)[0]
        assert y.shape == (count, m)
        assert (y == 0).all() or n * k * m * count


def test_what_it_cannot_run_is_refused(implementation):
    gate, up, down = weights(50, 40, 20)
    mlp, x = LowBitMlp.pack(gate, up, down, "silu"), vectors(3, 40)
    with pytest.raises(ValueError, match=r"vectors of shape \(3, 39\) don't fit a matrix of 40 columns"):
        mlp.run(x[:, 1:], 0.0, 0.0)
    with pytest.raises(TypeError, match=r"must be float32, got torch\.float16"):
        mlp.run(x.half(), 0.0, 0.0)
    with pytest.raises(ValueError, match="activation 'relu': the kernel knows silu and gelu_tanh"):
        LowBitMlp.pack(gate, up, down, "relu")
    with pytest.raises(ValueError, match=r"\(50, 40\), \(49, 40\), \(20, 50\) are no gated MLP"):
        LowBitMlp.pack(gate, up[1:], down, "silu")
    with pytest.raises(ValueError, match=r"\(50,\), \(50, 40\), \(20, 50\) are no gated MLP"):
        LowBitMlp.pack(gate[:, 0], up, down, "silu")
    with pytest.raises(ValueError, match="bits=3"):
        LowBitMlp.pack(gate, up, down, "silu", 3)
    with pytest.raises(TypeError, match=r"must be float32 or of half precision, got torch\.float64"):
        LowBitMlp.pack(gate.double(), up.double(), down.double(), "silu")


def test_an_mlp_without_columns_runs_where_nothing_is_read_in_full(implementation):
    matrices, x = weights(50, 40, 20), vectors(3, 40)
    mlp = LowBitMlp.pack(*matrices, "silu", full=None)
    assert mlp.bytes[1] == 0
    got, want = mlp.run(x, NOTHING, NOTHING), LowBitMlp.pack(*matrices, "silu").run(x, NOTHING, NOTHING)
    assert same_bits(got[0], want[0])
    assert got[1:] == want[1:] == (0, 0)
    x[1, 3] = float("nan")
    assert mlp.run(x, NOTHING, NOTHING)[0][1].isnan().all()
    for pair in [(1e-3, NOTHING), (NOTHING, 1e-3), (EVERYTHING, NOTHING)]:
        with pytest.raises(ValueError, match="made without columns to read in full"):
            mlp.run(x, *pair)
