"""Two runs on the same tokens: paired differences with their errors, and McNemar's test on their flips."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchlamp.results.flip_bits import unpack_bits
from torchlamp.results.result import Result

#: Results of one model agree in its float32 perplexity up to the order of its sums.
_SAME_REFERENCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """Figures of `other` minus those of `base`, both against the same reference on the same tokens.

    Standard errors are those of the mean over windows of the paired differences: what a window does to both runs
    cancels, so they are smaller than the runs' own errors together. NaN with a single window.
    """

    base: Result
    other: Result
    kl: float
    kl_standard_error: float
    #: Of the flip rates.
    flip: float
    flip_standard_error: float
    #: Of the means over windows of the cross entropy: ln(perplexity of other / perplexity of base).
    log_perplexity: float
    log_perplexity_standard_error: float
    #: Tokens that flip in one run alone; None where a result holds no flips of single tokens.
    only_base: int | None
    only_other: int | None
    #: McNemar's exact two-sided p value: the probability of a split of the `only_base + only_other` tokens at least
    #: as uneven as this, were both runs equally likely to flip. It takes tokens as independent. NaN without counts.
    mcnemar_p: float


def compare(base: Result, other: Result) -> Difference:
    """Compare two runs, each the tested policy of its file or one of its comparisons.

    Raises
    ------
    ValueError
        They aren't on the same tokens or against the same model, or a result is older than figures by window.
    """
    check_comparable(base, other)
    kl = _paired(base.kl_by_window, other.kl_by_window)
    flip = _paired(base.flip_by_window, other.flip_by_window)
    ratio = _paired(base.log_perplexity_ratio_by_window, other.log_perplexity_ratio_by_window)
    alone = _discordant(base, other)
    only_base, only_other = (None, None) if alone is None else alone
    p = math.nan if alone is None else mcnemar(*alone)
    return Difference(base, other, *kl, *flip, *ratio, only_base, only_other, p)


def check_comparable(base: Result, other: Result) -> None:
    """ValueError, with the reason, if the two runs can't be paired."""
    for one in (base, other):
        if not one.kl_by_window:
            raise ValueError(
                f"{one.policy}: the result has no KL by window; evaluate it anew with this version"
            )
    if base.tokens_sha256 != other.tokens_sha256 or base.windows != other.windows:
        raise ValueError(
            f"{other.policy} and {base.policy} ran on different tokens ({_windows(other)}, {_windows(base)}): evaluate "
            "both on the same text, windows and window length"
        )
    ratio = other.reference_perplexity / base.reference_perplexity
    if not abs(ratio - 1) <= _SAME_REFERENCE:
        raise ValueError(
            f"{other.policy} and {base.policy} have different references (float32 perplexity "
            f"{other.reference_perplexity:.4f} and {base.reference_perplexity:.4f}): compare runs of one model"
        )


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p value of an exact binomial test with probability 1/2 (McNemar's test, exact form).

    2 P(X <= min(b, c)) for X binomial of b + c trials, at most 1; the terms are formed by logarithms, so that no count
    is too large.
    """
    trials, least = only_first + only_second, min(only_first, only_second)
    if trials == 0:
        return 1.0
    total = math.lgamma(trials + 1) - trials * math.log(2)
    terms = (math.exp(total - math.lgamma(k + 1) - math.lgamma(trials - k + 1)) for k in range(least + 1))
    return min(1.0, 2 * math.fsum(terms))


def _paired(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of other - base over windows, and its standard error; NaN where one of them holds no windows."""
    if not base or len(base) != len(other):
        return math.nan, math.nan
    differences = [second - first for first, second in zip(base, other, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    if count < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


def _discordant(base: Result, other: Result) -> tuple[int, int] | None:
    """Tokens that flip in `base` alone and in `other` alone; None where one of them doesn't hold its flips."""
    if not base.flip_bits_by_window or not other.flip_bits_by_window:
        return None
    only_base = only_other = 0
    for first, second in zip(base.flip_bits_by_window, other.flip_bits_by_window, strict=True):
        pairs = zip(
            unpack_bits(first, base.window_length), unpack_bits(second, base.window_length), strict=True
        )
        for a, b in pairs:
            only_base += a and not b
            only_other += b and not a
    return only_base, only_other


def _windows(result: Result) -> str:
    return f"{result.windows} x {result.window_length} of {result.text}"
