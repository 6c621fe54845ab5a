import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from torchlamp.cli.progress import reporter
from torchlamp.evaluation.loop import Progress


def step(passes: int, kl: float = 0.00123) -> Progress:
    """Two windows of two passes each."""
    return Progress(
        windows=passes // 2,
        total_windows=2,
        passes=passes,
        total_passes=4,
        role="tested",
        kl_mean=kl,
        kl_standard_error=kl / 4 if passes > 2 else math.nan,
        elapsed=2.0 * passes,
        remaining=2.0 * (4 - passes),
    )


def test_plain_lines_one_a_window():
    output = io.StringIO()
    with reporter(Console(file=output)) as progress:
        for passes in range(1, 5):
            progress(step(passes))
    assert output.getvalue().splitlines() == [
        "window 1/2: KL 1.23e-03; 4 s, about 4 s left",
        "window 2/2: KL 1.23e-03 ± 3e-04; 8 s, about 0 s left",
    ]


def test_plain_lines_say_when_the_kl_is_not_finite():
    output = io.StringIO()
    with reporter(Console(file=output)) as progress:
        progress(step(2, math.nan))
    assert "KL not finite" in output.getvalue()


@pytest.mark.parametrize("passes", [1, 4])
def test_a_bar_on_a_terminal(passes):
    output = io.StringIO()
    with reporter(Console(file=output, force_terminal=True, width=120)) as progress:
        progress(step(passes))
    assert "KL 1.23e-03" in output.getvalue()
    assert f"{passes // 2}/2" in output.getvalue()
    assert f"{8 - 2 * passes} s left" in output.getvalue()


def test_the_bar_fits_an_ordinary_terminal():
    output = io.StringIO()
    with reporter(Console(file=output, force_terminal=True, width=80)) as progress:
        progress(replace(step(4), windows=499, total_windows=500, remaining=12345.0))
    assert "499/500" in output.getvalue()
    assert "KL 1.23e-03 ± 3e-04" in output.getvalue()
    assert "12345 s left" in output.getvalue()
