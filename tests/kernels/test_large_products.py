"""Products whose operands would take a multiple of their memory if they were packed at once, and Ctrl-C in a kernel."""

import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from operands import NATIVE
from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.matmul import matmul
from torchlamp.kernels.products import products

pytestmark = pytest.mark.skipif(not NATIVE, reason="no native kernels")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "spelling", ["ps4", "ps7/unfused", "ps7/block32", "ps13/promote128", "ps7/block100000"]
)
def test_many_narrow_matrices_are_each_what_they_are_alone(instruction_set, spelling):
    how = Accumulator.parse(spelling).accumulation
    a, b = draw(7000, 3, 96), draw(7000, 96, 1, seed=1)
    out, squares = products(a, b, how, squares=True, scaling=0.3)
    for first in (0, 3500):
        part = slice(first, first + 3500)
        want, want_squares = products(a[part].clone(), b[part].clone(), how, squares=True, scaling=0.3)
        assert torch.equal(out[part], want)
        assert torch.equal(squares[part], want_squares)


@pytest.mark.parametrize("spelling", ["ps4", "ps7/block32", "ps13/promote128", "ps7/block100000"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (60, 3)])
def test_long_sums_do_not_depend_on_the_instruction_set(monkeypatch, spelling, rows, columns):
    """They come in pieces of another length on each."""
    a, b = draw(1, rows, 300_000), draw(1, columns, 300_000, seed=1).mT
    found = []
    for name in NATIVE:
        monkeypatch.setenv("TORCHLAMP_KERNELS", name)
        found.append(products(a, b, Accumulator.parse(spelling).accumulation, squares=True, causal=0))
    for out, squares in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(squares, found[0][1])


def test_a_sum_of_ones_stops_growing():
    ones = torch.ones(2**24)
    assert matmul(ones, ones, "ps4") == 32
    assert matmul(ones, ones, "ps7/block4096") == 2**20
    assert matmul(ones, ones, "ps23") == 2**24


def run(code: str) -> subprocess.Popen[str]:
    code = "import resource, torch\nfrom torchlamp.kernels.products import products\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_long_vectors_take_no_more_memory_than_they_have():
    process = run("""
        import torchlamp
        x = torch.randn(2**23)
        torchlamp.matmul(x[:9], x[:9])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        torchlamp.matmul(x, x)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
    """)
    out, error = process.communicate(timeout=300)
    assert float(out) < 128, error  # MB; the operands have 32, their copy in blocks would have 2048


def test_memory_of_a_large_call_is_given_back():
    process = run("""
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
        how = __import__("torchlamp.arithmetic").arithmetic.Accumulator.parse("ps4").accumulation
        from torchlamp.kernels.attention import fused_attention
        q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 2**20, 64)
        import torchlamp
        call = lambda: fused_attention(q, k, k, how, weight="topz", threshold=1.0, by_length=False, scaling=0.1,
                                       error_scale=0.0, mask=None, causal=False, softcap=None, sinks=None)
        before = resident()
        call()
        print(resident() - before)
    """)
    out, error = process.communicate(timeout=300)
    assert float(out) < 128, error  # MB; the keys, packed, have 256


def test_ctrl_c_ends_a_running_kernel():
    process = run("""
        from torchlamp.arithmetic import Accumulator
        a, b = torch.ones(1, 1, 1).expand(1, 4096, 10**6), torch.ones(1, 1, 1).expand(1, 10**6, 4096)
        how = Accumulator.parse("ps4").accumulation
        print("ready", flush=True)
        try:
            products(a, b, how)
        except KeyboardInterrupt:
            print("interrupted", products(a[:, :2, :9], b[:, :9, :1], how)[0].tolist())
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)  # it takes minutes
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert out == "interrupted [[[9.0], [9.0]]]\n", error
