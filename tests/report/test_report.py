"""`torchlamp report` as a whole: what it writes, and what it leaves alone."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from sample_sweep import ALL_GROUPS, point_line, point_of, write_sweep
from typer.testing import CliRunner

import torchlamp.report.report as report_module
from torchlamp.cli import app
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.report.data import read_report_data
from torchlamp.report.figures import figures, save
from torchlamp.report.figures_data import figures_data
from torchlamp.report.report import code_states, page_data, report, report_page


@pytest.fixture(scope="module")
def sweep(tiny, tmp_path_factory):
    return write_sweep(tiny[0], tmp_path_factory.mktemp("sweep"), ALL_GROUPS[:1])


@pytest.fixture(scope="module")
def written(sweep, tmp_path_factory):
    """The files of a report by name."""
    target = tmp_path_factory.mktemp("out") / "new"
    files = report([sweep], target)
    assert all(file.is_file() for file in files)
    return {file.name: file for file in files}


def test_every_figure_comes_as_svg_png_and_csv(written):
    names = {Path(name).stem for name in written}
    where = "tiny-prose-real"
    kinds = (
        "kl-rate",
        "kl-cost",
        "flip-rate",
        "flip-cost",
        "kl-mu",
        "heads",
        "position",
        "layers",
        "sites",
        "transforms",
    )
    assert {f"{kind}-{where}" for kind in kinds} <= names
    for name in names - {"report", "points", "equal-rate"}:
        assert written[f"{name}.svg"].read_text().lstrip().startswith("<?xml")
        assert written[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
        assert len(pd.read_csv(written[f"{name}.csv"])) > 1


def test_tables_hold_all_points_and_ratios(written):
    points = pd.read_csv(written["points.csv"])
    assert len(points) == 4 + 18 + 2 + 2 + 3
    equal = pd.read_csv(written["equal-rate.csv"])
    strict, running = (equal[equal["rule"] == rule] for rule in ("strict", "running"))
    assert len(strict) > 2
    assert (strict["kl_ratio"] == 1).all()
    assert running["kl_ratio"].notna().any()
    assert running["kl_ratio_se"].dropna().gt(0).all()


def test_the_page_draws_the_data_of_the_files(sweep, written):
    """Each table of the page has the numbers of its CSV, to the page's six digits."""
    data = page_data(read_report_data([sweep]))
    names = {
        "curves": "kl-rate",
        "mu": "kl-mu",
        "positions": "position",
        "layers": "layers",
        "sites": "sites",
        "transforms": "transforms",
    }
    tables = {f["kind"]: f["rows"] for f in data["figures"] if f["site"] in ("", "scores")}
    tables |= {"points": data["points"], "equal-rate": data["rates"]}
    for kind, rows in tables.items():
        if kind == "heads":
            continue
        name = f"{names[kind]}-tiny-prose-real" if kind in names else kind
        expected, found = pd.read_csv(written[f"{name}.csv"]), pd.DataFrame(rows)
        assert list(found.columns) == list(expected.columns)
        assert len(found) == len(expected) > 0
        for column in expected.select_dtypes("number"):
            assert found[column].astype(float).tolist() == pytest.approx(
                expected[column].tolist(), rel=1e-5, nan_ok=True
            )
    heads = next(f for f in data["figures"] if f["kind"] == "heads")["rows"]
    unrolled = pd.read_csv(written["heads-tiny-prose-real.csv"])
    assert set(unrolled["policy"]) <= {row["policy"] for row in heads if row["typical"]}


def test_a_figure_is_drawn_the_same_twice(sweep, written, tmp_path):
    figure = next(iter(figures(figures_data(read_report_data([sweep])))))
    for file in save(figure, tmp_path):
        assert file.read_bytes() == written[file.name].read_bytes()


def test_an_error_leaves_the_older_report_alone(sweep, tmp_path, monkeypatch):
    (tmp_path / "figures").mkdir()
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "figures" / "kl-rate-tiny-prose-real.csv").write_text("old")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(report_module, "save", full)
    with pytest.raises(OSError, match="No space"):
        report([sweep], tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert (tmp_path / "figures" / "kl-rate-tiny-prose-real.csv").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figures", "report.html"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no results in"),
        (lambda folder: (folder / "results.jsonl").write_text(""), "nothing to report"),
        (
            lambda folder: (folder / "results.jsonl").write_text('{"schema": "torchlamp-sweep/7"}\n'),
            "sweep/7",
        ),
        (
            lambda folder: (folder / "results.jsonl").write_text(
                point_line(point_of("ps3+none"), None, "no")
            ),
            "all 1 points failed",
        ),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, prepare, message):
    prepare(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_inspect_writes_its_page(tiny_folder, tmp_path):
    page = tmp_path / "page.html"
    arguments = [
        "inspect",
        str(tiny_folder),
        "the quick fox",
        "--policy",
        "ps3+strict:0.2",
        "--output",
        str(page),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "recomputed" in done.output
    assert page.stat().st_size > 1e6
    refused = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "no" / "page.html")])
    assert refused.exit_code == 2
    assert "there is no folder" in refused.output


@pytest.mark.parametrize("length", [128, 4000])
def test_long_names_of_models_and_texts(tiny, tmp_path, length):
    """A path of 128 characters is nothing unusual; a file name has 255 at most."""
    result = evaluate(
        tiny[0], torch.arange(3, 43).view(1, 40), "ps3+strict:1", baselines=False, model_name="tiny"
    ).to_dict()
    ends = ("one", "two")
    lines = [
        point_line(
            point_of("ps3+strict:1", model=f"{end}/" + "m" * length, text=f"{end}/" + "ä" * length), result
        )
        for end in ends
    ]
    (tmp_path / "results.jsonl").write_text("".join(lines))
    files = report([tmp_path])
    assert len({file.name for file in files}) == len(files)
    assert max(len(file.name.encode()) for file in files) <= 255
    assert sum(file.name.startswith("kl-rate-") for file in files) == 3 * len(ends)


def test_a_file_in_the_place_of_the_folder(sweep, tmp_path):
    path = tmp_path / "passwd"
    path.write_text("root")
    result = CliRunner().invoke(app, ["report", str(sweep), "--output", str(path)])
    assert result.exit_code == 2
    assert (
        result.stderr
        == f"torchlamp: error: can't write a report into {str(path)!r}: it is a file, give a folder\n"
    )
    assert path.read_text() == "root"


def test_states_of_the_code_are_grouped():
    states = {
        "abc": ["2026-01-02", "2026-01-03"],
        "abc+": ["2026-01-04"],
        "def": ["2026-01-01"],
        "unknown": [""],
    }
    rows = {row["commit"]: row for row in code_states(states)}
    assert rows["abc"]["points"] == "3, 1 with uncommitted changes"
    assert rows["abc"]["dates"] == "2026-01-02 to 2026-01-04"
    assert rows["def"]["dates"] == "2026-01-01"
    assert rows["unknown"]["dates"] == "unknown"


def test_every_figure_of_the_page_links_to_files_that_are_there(sweep, written):
    names = {
        name for found in page_data(read_report_data([sweep]))["figures"] for name in found["files"].values()
    }
    own = {Path(name).stem for name in written if name.endswith(".png")}
    assert own <= names
    assert names - own == set()


def test_a_title_of_ones_own(sweep):
    page = report_page(read_report_data([sweep]), ["somewhere"], "Chips & <b>sums</b>")
    assert "<h1>Chips &amp; &lt;b&gt;sums&lt;/b&gt;</h1>" in page
