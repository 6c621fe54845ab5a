import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchlamp.arithmetic import Format
from torchlamp.arithmetic.operands import BLOCKS, Operand

SPELLINGS = st.one_of(
    st.sampled_from(["float32", "fp32", *BLOCKS]),
    st.builds("int{}{}".format, st.integers(2, 16), st.sampled_from(["", "/32", "/1", "/128", "/row", "/tensor"])),
    st.builds(
        "{}{}".format,
        st.sampled_from(["bf16", "fp16", "e4m3fn", "e5m2", "ue5m3", "e2m1fn", "ps7", "e4m3fn-flush"]),
        st.sampled_from(["", "/row", "/tensor"]),
    ),
)  # fmt: skip


@given(SPELLINGS)
def test_names_round_trip(spelling):
    operand = Operand.parse(spelling)
    assert Operand.parse(str(operand)) == operand
    assert Operand.parse(f" {spelling.upper()} ") == operand
    assert Operand.parse(operand) is operand
    assert pickle.loads(pickle.dumps(operand)) == operand
    assert {operand: 1}[Operand.parse(spelling)] == 1


@pytest.mark.parametrize(
    ("spelling", "printed"),
    [
        ("int8/32", "int8"),
        ("INT8", "int8"),
        ("int8/row", "int8/row"),
        ("int12/64", "int12/64"),
        ("fp32", "float32"),
        ("float32", "float32"),
        ("bf16", "bf16"),
        ("E4M3FN/Row", "e4m3fn/row"),
        ("MXFP4", "mxfp4"),
        ("mxfp8-e5m2", "mxfp8-e5m2"),
    ],
)
def test_the_canonical_spelling(spelling, printed):
    assert str(Operand.parse(spelling)) == printed


def test_what_differs_is_not_equal():
    names = ["float32", "int4", "int8", "int8/64", "int8/row", "int8/tensor", "bf16", "bf16/row", *BLOCKS]
    assert len({Operand.parse(name) for name in names}) == len(names)
    assert Operand() == Operand.parse("float32")


@pytest.mark.parametrize(
    ("spelling", "bits"),
    [
        ("float32", 32),
        ("int4", 4.5),
        ("int8", 8.5),
        ("int12", 12.5),
        ("int8/64", 8.25),
        ("int8/1", 24),
        ("int8/row", 8),
        ("int8/tensor", 8),
        ("bf16", 16),
        ("fp16", 16),
        ("ps7", 16),
        ("tf32", 19),
        ("e4m3fn", 8),
        ("e5m2/row", 8),
        ("ue5m3", 8),
        ("mxfp8", 8.25),
        ("mxfp8-e5m2", 8.25),
        ("mxfp6", 6.25),
        ("mxfp6-e3m2", 6.25),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5),
    ],
)
def test_bits_count_the_share_of_the_scale(spelling, bits):
    assert Operand.parse(spelling).bits == bits


def test_only_integers_in_groups_of_32_are_the_kernels_copies():
    for bits in (4, 8, 12):
        assert Operand.parse(f"int{bits}/32").kernel_bits == bits
    others = ["float32", "int5", "int16", "int8/16", "int8/row", "int8/tensor", "bf16", "e4m3fn/row", *BLOCKS]
    assert [Operand.parse(name).kernel_bits for name in others] == [None] * len(others)


def test_only_float32_changes_nothing():
    assert Operand.parse("fp32").is_float32
    assert not any(Operand.parse(name).is_float32 for name in ("int16", "bf16", "ps23/row", *BLOCKS))


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("mxpf4", r"unknown operand 'mxpf4', did you mean 'mxfp4'\?; allowed: float32, int2..int16 "),
        ("nvfp3", r"unknown operand 'nvfp3', did you mean 'nvfp4'\?; allowed: "),
        ("fp8", r"unknown operand 'fp8', did you mean 'e4m3fn'\?; "),
        ("bfloat16", r"unknown operand 'bfloat16', did you mean 'bf16'\?; "),
        ("", r"unknown operand ''; allowed: .*mxfp8, mxfp8-e5m2, .*nvfp4"),
        ("mxfp4/row", r"unknown operand 'mxfp4/row', did you mean 'mxfp4'\?; "),
        ("int1", r"operand 'int1': integers have 2 to 16 bits; allowed: "),
        ("int17/row", r"operand 'int17/row': integers have 2 to 16 bits; "),
        ("int8/0", r"unknown scaling '/0' in operand 'int8/0'; allowed: /row, /tensor and, for integers, "),
        ("int8/", r"unknown scaling '/' in operand 'int8/'; "),
        ("int8/032", r"unknown scaling '/032' in operand 'int8/032'; "),
        ("int8/32/row", r"unknown scaling '/32/row' in operand 'int8/32/row'; "),
        ("int8/column", r"unknown scaling '/column' in operand 'int8/column'; "),
        ("e4m3fn/32", r"unknown scaling '/32' in operand 'e4m3fn/32'; "),
        ("int8/\N{ARABIC-INDIC DIGIT FOUR}", r"unknown scaling "),
    ],
)
def test_errors_quote_the_spelling_and_say_what_is_allowed(spelling, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        Operand.parse(spelling)
    assert "\n" not in str(error.value)


def test_other_types():
    with pytest.raises(TypeError, match="an operand is a name like 'int8/32', got int 8"):
        Operand.parse(8)
    with pytest.raises(TypeError, match="got Format"):
        Operand.parse(Format.parse("bf16"))
