import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.arithmetic import Accumulator, Format
from torchlamp.arithmetic.accumulators import NAMED
from torchlamp.kernels.specification import Accumulation, Grid
from torchlamp.policy.policy import Policy

accumulators = st.builds(
    lambda name, fused, lengths: Accumulator(Format.parse(name), fused, *lengths),
    st.sampled_from(["ps4", "e4m3fn-sat", "bf16", "ue5m3"]),
    st.booleans(),
    st.one_of(st.tuples(st.integers(1, 300), st.just(0)), st.tuples(st.just(1), st.integers(0, 300))),
)


@given(accumulators)
def test_spellings_round_trip(accumulator):
    assert Accumulator.parse(str(accumulator)) == accumulator
    assert Accumulator.parse(accumulator) is accumulator


@pytest.mark.parametrize(
    ("spelling", "canonical", "accumulation"),
    [
        ("ps4", "ps4", Accumulation(Grid(4))),
        ("ps7/unfused", "ps7/unfused", Accumulation(Grid(7), fused=False)),
        ("ps7/block32", "ps7/block32", Accumulation(Grid(7), block=32)),
        ("ps13/promote128", "ps13/promote128", Accumulation(Grid(13), promote=128)),
        ("ps7/promote128/unfused", "ps7/unfused/promote128", Accumulation(Grid(7), fused=False, promote=128)),
        (" PS7/Block1 ", "ps7", Accumulation(Grid(7))),
        ("fp32/promote1", "fp32/promote1", Accumulation(Grid(), promote=1)),
    ],
)
def test_what_a_spelling_means(spelling, canonical, accumulation):
    accumulator = Accumulator.parse(spelling)
    assert str(accumulator) == canonical
    assert accumulator.accumulation == accumulation


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stands_for_its_spelling(name):
    """It is printed under its name, and equals what it stands for."""
    assert not set("/@.+,=: ") & set(name)
    accumulator = Accumulator.parse(f" {name.upper()} ")
    assert str(accumulator) == name
    assert accumulator == Accumulator.parse(NAMED[name])
    assert hash(accumulator) == hash(Accumulator.parse(NAMED[name]))
    assert str(Accumulator.parse(NAMED[name])) == NAMED[name]
    for spelling in (name, f"int3@{name}.center"):  # int3 enters every unit
        policy = Policy.parse(f"{spelling}+strict:0.1")
        assert str(policy) == f"{spelling}+strict:0.1"
        assert Policy.parse(str(policy)) == policy


def test_a_name_takes_no_options():
    with pytest.raises(
        ValueError, match=r"'deepseek-fp8/unfused': .* stands for 'ps13/promote128' and takes no"
    ):
        Accumulator.parse("deepseek-fp8/unfused")


def test_a_misspelt_name_is_suggested():
    with pytest.raises(ValueError, match="did you mean 'deepseek-fp8'"):
        Policy.parse("deepsek-fp8+strict:0.1")


def test_formats_are_accumulators_and_names_are_formats():
    assert Accumulator.parse(Format.parse("ps4")) == Accumulator("ps4") == Accumulator.parse("ps4")


@pytest.mark.parametrize(
    "spelling",
    [
        "ps4/",
        "ps4/block",
        "ps4/block0",
        "ps4/promote0",
        "ps4/fused",
        "ps4/unfused/unfused",
        "ps4/block2/block3",
        "ps4/block-2",
        "ps4/block1\N{ARABIC-INDIC DIGIT TWO}",
    ],
)
def test_unknown_options(spelling):
    with pytest.raises(ValueError, match=r"can't use option .* in accumulator 'ps4/.*/blockB or /promoteB"):
        Accumulator.parse(spelling)


def test_other_errors():
    with pytest.raises(ValueError, match=r"'ps4/block2/promote3': .*only one of them"):
        Accumulator.parse("ps4/block2/promote3")
    with pytest.raises(ValueError, match="'/block2' lacks its format"):
        Accumulator.parse("/block2")
    with pytest.raises(ValueError, match="unknown format 'ps44'"):
        Accumulator.parse("ps44/block2")
    with pytest.raises(TypeError, match="got int 4"):
        Accumulator.parse(4)
