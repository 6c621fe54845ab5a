"""Every axis of every picture has two labelled ticks or more."""

import math

import pytest
from matplotlib.figure import Figure as Canvas
from sample_sweep import ALL_GROUPS, write_sweep

from torchlamp.report.data import read_report_data
from torchlamp.report.figures import figures
from torchlamp.report.figures_data import figures_data
from torchlamp.report.log_axis import log_range, log_ticks


@pytest.mark.parametrize(
    "values",
    [[0.3], [0.02, 0.021], [1e-7, 0.9], [0.0011, 0.0019], [4.4e-5, 4.40001e-5], [1e-12, 3], [7, 0, math.nan]],
)
def test_at_least_two_ticks_lie_on_the_axis(values):
    low, high = log_range(values)
    good = [value for value in values if value > 0]
    assert low < min(good) <= max(good) < high
    ticks = log_ticks(low, high)
    assert 2 <= len(set(ticks)) <= 12
    assert all(low <= tick <= high for tick in ticks)


def test_nothing_positive_has_no_range():
    assert log_range([0.0, -1.0, math.inf]) is None


def test_every_axis_on_paper_has_two_labels(tiny, tmp_path):
    data = read_report_data([write_sweep(tiny[0], tmp_path, ALL_GROUPS[:1])])
    kinds = set()
    for figure in figures(figures_data(data)):
        canvas = Canvas(layout="constrained")
        figure.draw(canvas, figure.data)
        canvas.draw_without_rendering()
        kinds.add(figure.name.split("-")[0])
        for panel in canvas.axes:
            for axis in (panel.xaxis, panel.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
                words = axis.get_major_formatter().format_ticks(ticks)
                assert len({word for word in words if word}) >= 2 or panel.get_label() == "<colorbar>", (
                    figure.name
                )
    assert {"kl", "flip", "mu", "heads", "position", "layers", "sites", "transforms"} <= kinds | {"mu"}
