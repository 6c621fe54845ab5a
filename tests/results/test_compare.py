import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_rel

from sample_result import make, whole
from torchlamp.results.compare import compare, mcnemar
from torchlamp.results.flip_bits import pack_bits, unpack_bits
from torchlamp.results.result import Result


def run(kl: list[float], flips: list[list[bool]]) -> Result:
    return make(
        windows=len(kl),
        kl_by_window=kl,
        flip_by_window=[sum(f) / len(f) for f in flips],
        log_perplexity_ratio_by_window=kl,
        flip_bits_by_window=[pack_bits(f) for f in flips],
    )


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_come_back(bits):
    assert unpack_bits(pack_bits(bits), len(bits)) == bits


def test_bits_of_another_length_are_refused():
    with pytest.raises(ValueError, match="2 hexadecimal digits are no 9 bits"):
        unpack_bits("ff", 9)


@pytest.mark.parametrize("counts", [(0, 0), (3, 3), (1, 9), (40, 20), (0, 12), (600, 700)])
def test_mcnemar_is_the_exact_binomial_test(counts):
    expected = binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1.0
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-9)


def test_differences_are_paired():
    base = run([0.1, 0.3, 0.2], [[True] * 2 + [False] * 6] * 3)
    other = run([0.05, 0.26, 0.11], [[False, True, True, True] + [False] * 4] * 3)
    found = compare(base, other)
    test = ttest_rel(other.kl_by_window, base.kl_by_window)
    assert found.kl == pytest.approx(-0.06)
    assert found.kl / found.kl_standard_error == pytest.approx(float(test.statistic))
    assert (found.log_perplexity, found.flip) == (pytest.approx(-0.06), pytest.approx(1 / 8))
    assert (found.only_base, found.only_other) == (3, 6)
    assert found.mcnemar_p == mcnemar(3, 6)


def test_one_window_has_no_error():
    one = run([0.1], [[False] * 8])
    assert math.isnan(compare(one, one).kl_standard_error)


def test_older_results_have_no_counts():
    found = compare(whole(), make(flip_bits_by_window=[]))
    assert found.only_base is None
    assert math.isnan(found.mcnemar_p)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens_sha256": "01"}, "different tokens"),
        ({"windows": 3}, "different tokens"),
        ({"reference_perplexity": 0.26}, "different references"),
        ({"reference_perplexity": math.nan}, "different references"),
        ({"kl_by_window": []}, "no KL by window"),
    ],
)
def test_what_can_t_be_paired_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        compare(whole(), replace(whole(), **changes))
