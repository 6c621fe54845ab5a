"""Accumulators with an online softmax: spelling, formats, and where they are refused."""

import pytest
import torch

import torchlamp
from torchlamp.arithmetic import Accumulator
from torchlamp.policy.policy import Policy
from torchlamp.simulation.linear import linear
from torchlamp.simulation.norms import norm_input
from torchlamp.sweep.policies import Candidate


@pytest.mark.parametrize(
    "spelling",
    [
        "e4m3fn-sat/online11",
        "ps3/online11/stochastic",
        "ps7/unfused/online12",
        "fp16/block4/online16",
        "lamp8",
    ],
)
def test_spelling_is_read_back(spelling):
    accumulator = Accumulator.parse(spelling)
    assert str(accumulator) == spelling
    assert Accumulator.parse(str(accumulator)) == accumulator
    policy = f"{spelling}.center+strict:0.1"
    assert str(Policy.parse(policy)) == policy


def test_names():
    assert Accumulator.parse("lamp8") == Accumulator.parse("e4m3fn-sat/online11")
    assert Accumulator.parse("lamp8-ps") == Accumulator.parse("ps3/online11")
    assert Accumulator.parse("lamp8").recomputation.grid.mantissa_bits == 11
    assert Accumulator.parse("lamp8") != Accumulator.parse("e4m3fn-sat")


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("ps4/online4", "allowed are 5 to 21"),
        ("ps4/online22", "allowed are 5 to 21"),
        ("ps4/online0", "can't use option 'online0'"),
        ("ps4/stochastic", "write for example 'e4m3fn-sat/online11/stochastic'"),
        ("ps4/online8/stochastic/stochastic", "write for example"),
        ("ue4m3/online11", "takes a signed format"),
        ("fuse16/25/online24", "takes no option but /promoteB|allowed are"),
        ("lamp8/stochastic", "takes no options"),
    ],
)
def test_what_is_refused(spelling, words):
    with pytest.raises(ValueError, match=words):
        Accumulator.parse(spelling)


def test_only_scores_have_a_softmax_over_keys():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    for call in (
        lambda: torchlamp.matmul(x, weight.mT, "lamp8"),
        lambda: linear(x, weight, accumulator="lamp8", rule="none"),
        lambda: norm_input(x, accumulator="lamp8", rule="none", norm=None),
        lambda: torchlamp.compose(torch.nn.Linear(8, 5), torch.tanh, x, "lamp8"),
    ):
        with pytest.raises(ValueError, match="which only the site scores has: use 'e4m3fn-sat'"):
            call()


def test_random_rounding_is_random_to_sweeps():
    assert Candidate("ps3/online9/stochastic+none").random
    assert not Candidate("lamp8+none").random
