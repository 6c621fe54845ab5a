"""Rows of policies with operands and transforms: labelled by all of their precision."""

import math

import pytest
import torch
from sample_sweep import point_line, point_of

from torchlamp.evaluation.evaluate import evaluate
from torchlamp.report import data


@pytest.mark.parametrize(
    ("policy", "label", "mu"),
    [
        ("int8.center+running:0.01", "int8.center", math.nan),
        ("qkv=mxfp4@ps7+none", "mxfp4@ps7", 7),
        ("scores=int8, values=int8", "int8", math.nan),
        ("ps5+none", "ps5", 5),
    ],
)
def test_a_row_has_the_whole_precision_and_a_width_only_for_an_accumulator(tiny, policy, label, mu):
    windows = torch.randint(3, 300, (1, 16), generator=torch.Generator().manual_seed(3))
    result = evaluate(tiny[0], windows, policy, baselines=False, model_name="tiny").to_dict()
    assert result["policy"] == policy
    row = data._row(data.Result.from_dict(result))
    assert row["accumulate"] == label
    assert row["mu"] == pytest.approx(mu, nan_ok=True)


def test_a_sweep_of_operands_can_be_read(tiny, tmp_path):
    windows = torch.randint(3, 300, (1, 16), generator=torch.Generator().manual_seed(3))
    policy = "int8.center+running:0.01"
    result = evaluate(tiny[0], windows, policy, baselines=False, model_name="tiny", blocks=True).to_dict()
    (tmp_path / "results.jsonl").write_text(point_line(point_of(policy), result))
    (row,) = data.read_report_data([tmp_path]).points.to_dict("records")
    assert (row["accumulate"], row["rule"], row["threshold"]) == ("int8.center", "running", 0.01)
