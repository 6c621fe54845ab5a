import io

import pytest
from rich.console import Console

from torchlamp.cli.sweep_progress import duration, left, sweep_reporter
from torchlamp.sweep.folder import Outcome
from torchlamp.sweep.points import Point
from torchlamp.sweep.run import SweepProgress

POINT = Point("m", "prose", "shuffled", 1, 8, "ps4+strict:{}", (3,), 5, 0.01)
FIGURES = {"kl_mean": 0.0123, "kl_standard_error": 0.001, "recompute_rate": 0.0234}


def steps() -> list[SweepProgress]:
    return [
        SweepProgress(0, 0, 3, None, POINT, 0.0, None),
        SweepProgress(1, 0, 3, Outcome(POINT, FIGURES, None, 2.0), POINT, 2.0, 4000.0),
        SweepProgress(1, 1, 3, Outcome(POINT, None, "no [memory] left", 1.0), POINT, 3.0, 40.0),
        SweepProgress(
            2, 1, 3, Outcome(POINT, FIGURES | {"kl_mean": float("nan")}, None, 2.0), None, 5.0, 0.0
        ),
    ]


def shown(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, color_system=None)
    with sweep_reporter(console) as progress:
        for step in steps():
            progress(step)
    return out.getvalue()


def test_plain_lines():
    point = "m prose shuffled ps4+strict:{} at 1 % in layer 3 seed 5"
    assert shown(False).splitlines() == [
        f"0 of 3 points are done; next: {point}",
        f"1/3: {point}: KL 1.23e-02 ± 1e-03, 2.34 % recomputed, 2.0 s; about 1 h 7 min left",
        f"1/3, 1 failed: {point}: FAILED: no [memory] left; about 40 s left",
        f"2/3, 1 failed: {point}: KL not finite, 2.34 % recomputed, 2.0 s; about 0 s left",
    ]


def test_a_terminal_has_the_same_lines_and_a_bar():
    text = shown(True)
    assert "KL 1.23e-02 ± 1e-03, 2.34 % recomputed, 2.0 s" in text
    assert "FAILED: no [memory] left" in text
    assert "2/3" in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (3570, "1 h 0 min"), (12000, "3 h 20 min")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said
    assert left(seconds) == f"about {said} left"
    assert left(None) == ""
