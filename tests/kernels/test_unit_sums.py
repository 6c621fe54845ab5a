"""The native sums of matrix units against their readable reference, for operands that no unit takes, too."""

import pytest
import torch

from operands import KINDS, draw, same_bits
from torchlamp import lookahead
from torchlamp.arithmetic import Accumulator
from torchlamp.arithmetic.operands import Operand
from torchlamp.kernels.products import products
from torchlamp.kernels.reference import products_reference

#: Every way in which the native kernel may form a sum: short and long integers, float64, each unit's length.
SPELLINGS = ["hopper-fp8", "hopper", "volta", "blackwell-fp8", "ps13/fuse16/13/promote40", "fuse3/40/nearest",
             "fp16/fuse16/25/nearest", "ps4/fuse5/7", "fuse1024/1"]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_sums_squares_and_scaled_sums_equal_the_reference(instruction_set, spelling):
    how = Accumulator.parse(spelling).accumulation
    for kind in KINDS:
        a, b = draw(kind, 4, 7, 70), draw(kind, 2, 70, 67, seed=1)
        for scaling in (None, 0.0721687836):
            got = products(a, b, how, scaling=scaling, squares=True)
            want = products_reference(a, b, how, scaling=scaling, squares=True)
            assert same_bits(got[0], want[0]), kind
            assert same_bits(got[1], want[1]), kind
            assert same_bits(products(a, b, how, scaling=scaling)[0], want[0]), kind


@pytest.mark.parametrize("operand", ["e4m3fn", "e5m2"])
def test_narrow_operands_with_and_without_subnormal_numbers(instruction_set, operand):
    stored = Operand.parse(operand)
    dtype = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[operand]
    for unit in ("hopper-fp8", "ada-fp8/promote64", "blackwell-fp8"):
        how = Accumulator.parse(unit).taking(stored, stored).accumulation
        for size in (1.0, 2.0**-7):
            a = (draw("ordinary", 1, 9, 200) * size).to(dtype).float()
            b = (draw("ordinary", 1, 200, 65, seed=1) * size).to(dtype).float()
            assert same_bits(products(a, b, how)[0], products_reference(a, b, how)[0])


def test_a_long_sum_is_taken_whole(instruction_set):
    """More products than a thread packs at a time."""
    how = Accumulator.parse("hopper-fp8/promote100").accumulation
    a, b = draw("ordinary", 1, 2, 20000), draw("ordinary", 1, 20000, 3, seed=1)
    assert same_bits(products(a, b, how)[0], products_reference(a, b, how)[0])


@pytest.mark.parametrize(
    "policy",
    [
        "hopper-fp8+strict:0.02",
        "e4m3fn@hopper-fp8.center+topz:0.05",
        "hopper+running:1e-8",
        "mxfp4@blackwell-fp4+strict:0.02",
        "mlp_up=mxfp4@hopper-fp8+output:0.01",
    ],
)
def test_models_run_as_with_the_reference(tiny, monkeypatch, policy):
    model, _ = tiny
    tokens = torch.randint(0, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    found = {}
    for kernels in ("torch", "portable"):
        monkeypatch.setenv("TORCHLAMP_KERNELS", kernels)
        with torch.no_grad(), lookahead(model, policy) as statistics:
            found[kernels] = model(tokens).logits, statistics.recompute_rate
    assert torch.allclose(found["torch"][0], found["portable"][0], atol=1e-4)
    assert found["torch"][1] == pytest.approx(found["portable"][1], abs=0.01)
