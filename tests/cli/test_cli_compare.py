import json

import pytest
from commands import error_line, run

from sample_result import make, whole
from torchlamp.report.data import read_report_data


@pytest.fixture
def files(tmp_path):
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text(whole().to_json())
    other.write_text(
        make(policy="ps4+running:0.03", kl_by_window=[0.1, 0.2], flip_bits_by_window=["00", "0f"]).to_json()
    )
    return one, other


def test_compare_prints_a_table_and_writes_json(files, tmp_path):
    out = tmp_path / "d.json"
    result = run("compare", *files, "--json", out)
    assert result.exit_code == 0, result.output
    rows = result.stdout.splitlines()
    assert rows[0].startswith("Base: m, ps4+strict:0.1")
    assert rows[3].split()[0] == "ps4+running:0.03"
    assert "-1.00e-01 ±5e-02" in rows[3]
    assert "4 / 4" in rows[3]
    first = json.loads(out.read_text())[0]
    assert first["kl_difference"] == pytest.approx(-0.1)
    assert (first["flips_only_base"], first["flips_only_other"], first["mcnemar_p"]) == (4, 4, 1)
    assert len(json.loads(run("compare", files[0], "--json", "-").stdout)) == 2


def test_what_is_no_result(files, tmp_path):
    assert "holds one run" in error_line(run("compare", files[1]))
    assert "No such file" in error_line(run("compare", tmp_path / "missing.json"))
    (tmp_path / "x.json").write_text("{}")
    assert "is no result of torchlamp evaluate" in error_line(run("compare", tmp_path / "x.json"))
    (tmp_path / "y.json").write_text(whole(tokens_sha256="11").to_json())
    assert "different tokens" in error_line(run("compare", files[0], tmp_path / "y.json"))


def test_a_report_of_evaluations(files, tmp_path):
    points = read_report_data(list(files)).points
    assert set(points["policy"]) >= {"ps4+strict:0.1", "ps4+running:0.03", "ps4+none"}
    result = run("report", *files, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "ps4+running:0.03" in (tmp_path / "out" / "figures" / "points.csv").read_text()
