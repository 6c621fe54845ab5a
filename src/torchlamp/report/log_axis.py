"""Log axes in plain numbers, with at least two labelled ticks whatever the values; page.js does the same."""

import math
from collections.abc import Iterable
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

#: Digits of the ticks in a decade, from few to many; the first that gives `MIN_TICKS` is taken. page.js has the same.
DIGITS = (
    (1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(round(1 + 0.1 * i, 1) for i in range(90)),
)  # fmt: skip
MIN_TICKS = 3


def log_range(values: Iterable[float]) -> tuple[float, float] | None:
    """The ends of an axis over positive values: a tenth of a decade more, and a factor of 1.5 at least.

    None without such values.
    """
    good = [value for value in values if value > 0 and math.isfinite(value)]
    if not good:
        return None
    low, high = min(good), max(good)
    pad = max(10**0.1, (1.5 * low / high) ** 0.5)
    return low / pad, high * pad


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends, at least two: decades first, with ever more digits between where these are few.

    Ends nearer than round numbers of two digits give three steps of equal factors.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in DIGITS:
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= MIN_TICKS:
            every = math.ceil(len(ticks) / 12)
            return ticks[::every] if len(digits) > 1 else ticks[:: math.ceil(len(ticks) / 8)]
    return [float(f"{low * (high / low) ** part:.4g}") for part in (0.1, 0.5, 0.9)]


def log_axis(axis: Any, values: Iterable[float], percent: bool = False) -> None:
    """Make a matplotlib axis logarithmic over the values; ticks of shared axes are shared."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    ends = log_range(values)
    if ends is None:
        return
    axis.axes.set(**{f"{axis.axis_name}lim": ends})

    def words(value: float, _: int | None = None) -> str:
        if percent:
            return f"{100 * value:.3g} %"
        if 9e-4 <= value < 1e4:
            return f"{value:.4g}"
        digits, power = f"{value:.3e}".split("e")
        times = "" if float(digits) == 1 else f"{float(digits):g}\\cdot "
        return f"${times}10^{{{int(power)}}}$"

    axis.set_major_locator(FixedLocator(log_ticks(*ends)))
    axis.set_major_formatter(FuncFormatter(words))
    axis.set_minor_locator(NullLocator())
