import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from torchlamp.decoding.key_value_store import KeyValueStore, StoreOptions
from torchlamp.kernels import native

INF = float("inf")
ALL, NONE = (-1.0, -1.0), (INF, INF)
EXACT = StoreOptions(full=torch.float32)


def operands(batch, heads, kv_heads, keys, size, value_size=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, 1, size, generator=generator) * 2
    k = torch.randn(batch, kv_heads, keys, size, generator=generator) + 1
    v = torch.randn(batch, kv_heads, keys, value_size or size, generator=generator)
    return q, k, v


def filled(k, v, options=EXACT):
    store = KeyValueStore(options)
    store.append(k, v)
    return store


def attend(store, q, thresholds, **more):
    scores, values = thresholds
    return store.attend(
        q, scaling=q.shape[-1] ** -0.5, scores_threshold=scores, values_threshold=values, **more
    )


def exact(q, k, v, mask=None):
    scaled = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)
    return scaled.transpose(1, 2)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 6),
    keys=st.integers(1, 90),
    size=st.sampled_from([1, 3, 16, 33, 64]),
    value_size=st.sampled_from([1, 8, 40]),
    key_bits=st.sampled_from([4, 8]),
    value_bits=st.sampled_from([4, 8]),
    center=st.booleans(),
    hadamard=st.booleans(),
    softcap=st.sampled_from([0.0, 5.0]),
    sinks=st.booleans(),
    masked=st.booleans(),
    thresholds=st.sampled_from([ALL, NONE, (0.01, 0.05), (0.3, INF), (INF, 0.2)]),
    seed=st.integers(0, 1000),
)
def test_kernel_equals_reference(
    batch, kv_heads, group, keys, size, value_size, key_bits, value_bits, center, hadamard, softcap, sinks,
    masked, thresholds, seed,
):  # fmt: skip
    if not native.available():
        pytest.skip("no native kernels")
    options = StoreOptions(key_bits, value_bits, torch.float32, center, hadamard and size & (size - 1) == 0)
    q, k, v = operands(batch, kv_heads * group, kv_heads, keys, size, value_size, seed)
    generator = torch.Generator().manual_seed(seed)
    more = {"softcap": softcap}
    if sinks:
        more["sinks"] = torch.randn(kv_heads * group, generator=generator)
    if masked:
        more["mask"] = torch.rand(batch, 1, keys, generator=generator) < 0.7
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for kernels in ("", "torch"):
            patch.setenv("TORCHLAMP_KERNELS", kernels)
            store = KeyValueStore(options)
            for part in (slice(0, keys // 2), slice(keys // 2, keys)):
                store.append(k[:, :, part], v[:, :, part])
            found.append(attend(store, q, thresholds, **more))
    kernel, reference = found
    # Entries within rounding of a threshold may be decided otherwise.
    slack = 2 + 0.02 * kernel.eligible
    assert abs(kernel.recomputed - reference.recomputed) <= slack
    assert abs(kernel.full_values - reference.full_values) <= slack
    assert (kernel.eligible, kernel.eligible_values) == (reference.eligible, reference.eligible_values)
    exactly = (kernel.recomputed, kernel.full_values) == (reference.recomputed, reference.full_values)
    # The kernel rounds a value's weight to 1/32767 of the largest in its window.
    rounded = 1e-4 + keys * 0.5 / 32767 * float(v.abs().max())
    torch.testing.assert_close(
        kernel.output, reference.output, rtol=1e-4 if exactly else 0.2, atol=rounded if exactly else 0.2
    )


def test_all_is_full_precision(implementation):
    q, k, v = operands(2, 6, 2, 300, 64)
    attended = attend(filled(k, v), q, ALL)
    torch.testing.assert_close(attended.output.double(), exact(q, k, v), rtol=1e-5, atol=1e-5)
    assert attended.recomputed == attended.eligible == 2 * 6 * 300
    assert attended.full_values == attended.eligible_values == 2 * 2 * 300


def test_errors_fall_with_the_thresholds(implementation):
    q, k, v = operands(1, 4, 2, 500, 64)
    store = filled(k, v)
    errors = [
        (attend(store, q, t).output.double() - exact(q, k, v)).norm()
        for t in (NONE, (1e-3, 1e-2), (1e-5, 1e-4), ALL)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 20 * errors[-1]


def test_one_key_is_its_value(implementation):
    q, k, v = operands(1, 2, 1, 1, 16)
    torch.testing.assert_close(attend(filled(k, v), q, (0.1, 0.1)).output[0, 0], v[0, :, 0].expand(2, -1))


def test_no_key(implementation):
    store = KeyValueStore(EXACT)
    q, k, v = operands(1, 2, 1, 0, 16)
    store.append(k, v)
    assert store.length == 0
    assert attend(store, q, ALL).output.abs().sum() == 0


def test_fully_masked_row_is_the_mean(implementation):
    q, k, v = operands(2, 2, 1, 20, 16)
    mask = torch.ones(2, 1, 20, dtype=torch.bool)
    mask[1] = False
    attended = attend(filled(k, v), q, (0.01, 0.01), mask=mask)
    torch.testing.assert_close(attended.output[1, 0], v[1].mean(1).expand(2, -1), rtol=1e-4, atol=1e-5)
    assert attended.eligible == 2 * 20


def test_window(implementation):
    q, k, v = operands(1, 4, 2, 100, 32)
    attended = attend(filled(k, v), q, ALL, first=70)
    torch.testing.assert_close(
        attended.output.double(), exact(q, k[:, :, 70:], v[:, :, 70:]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("unusual", [0.0, INF, -INF, math.nan, 1e-42, 3e38])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_unusual_numbers_give_what_float32_gives(implementation, unusual, where):
    q, k, v = operands(1, 2, 1, 40, 32)
    q = q.abs() + 0.1
    {"q": q, "k": k, "v": v}[where][:, :, 0 if where == "q" else 7, 3] = unusual
    found = attend(filled(k, v), q, (0.01, 0.01)).output
    plain = ((q @ k.mT) * 32**-0.5).softmax(-1) @ v
    expected = plain.transpose(1, 2)
    assert torch.equal(found.isfinite(), expected.isfinite())
    if expected.isfinite().all():
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_zeros(implementation):
    q, k, v = (torch.zeros_like(x) for x in operands(1, 2, 1, 33, 32))
    assert torch.equal(attend(filled(k, v), q, (0.1, 0.1)).output, torch.zeros(1, 1, 2, 32))


def test_threads_do_not_matter():
    q, k, v = operands(1, 9, 3, 5000, 64)
    store, threads = filled(k, v), torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(attend(store, q, (1e-4, 1e-3)).output)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_many_threads_at_once():
    q, k, v = operands(1, 9, 3, 1500, 64)
    store = filled(k, v)
    expected = attend(store, q, (1e-4, 1e-3)).output
    with ThreadPoolExecutor(8) as pool:
        for output in pool.map(lambda _: attend(store, q, (1e-4, 1e-3)).output, range(64)):
            assert torch.equal(output, expected)


def test_growth_keeps_everything(implementation):
    q, k, v = operands(2, 4, 2, 333, 32)
    store, capacities = KeyValueStore(EXACT), set()
    for i in range(333):
        store.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        capacities.add(store.capacity)
    assert len(capacities) <= 4  # doubling
    once = KeyValueStore(EXACT)
    once.mean = store.mean
    once.append(k, v)
    torch.testing.assert_close(attend(store, q, (0.01, 0.1)).output, attend(once, q, (0.01, 0.1)).output)


def test_select_crop_and_drop(implementation):
    q, k, v = operands(3, 4, 2, 60, 32)
    store = filled(k, v)
    store.select(torch.tensor([2, 0, 2]))
    store.crop(50)
    store.drop_first(9)
    k, v = k[[2, 0, 2], :, 9:50], v[[2, 0, 2], :, 9:50]
    torch.testing.assert_close(attend(store, q, ALL).output.double(), exact(q, k, v), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend(store, q, NONE).output.double(), exact(q, k, v), rtol=0.1, atol=0.1)
    store.crop(0)
    assert store.bytes == (0, 0)


def test_copies_and_states(implementation):
    q, k, v = operands(1, 4, 2, 60, 32)
    store = filled(k, v)
    again = KeyValueStore(EXACT)
    again.restore(store.state())
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store)), again):
        assert torch.equal(attend(other, q, (0.01, 0.1)).output, attend(store, q, (0.01, 0.1)).output)


def test_refuses():
    _, k, v = operands(1, 2, 1, 4, 24)
    store = filled(k, v)
    with pytest.raises(ValueError, match="don't fit a cache"):
        store.append(k[..., :16], v)
    with pytest.raises(ValueError, match="must be"):
        store.append(k, v[:, :, :2])
    with pytest.raises(TypeError, match="float32"):
        store.append(k.half(), v.half())
    with pytest.raises(ValueError, match="power of two"):
        filled(k, v, StoreOptions(hadamard=True))
    with pytest.raises(ValueError, match="65504"):
        filled(k * 1e6, v, StoreOptions())
    with pytest.raises(ValueError, match="key_bits=3"):
        StoreOptions(key_bits=3)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        StoreOptions(full=torch.int8)
