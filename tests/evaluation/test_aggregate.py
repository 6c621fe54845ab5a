import math

import pytest
import torch

from torchlamp.evaluation.aggregate import PERCENTILES, aggregate, mean_and_error, percentiles
from torchlamp.evaluation.metrics import TokenMetrics


def window(kl, flips=None, entropy=(1.0, 2.0), reference=(1.0, 1.5)) -> TokenMetrics:
    kl = torch.tensor(kl, dtype=torch.float64)
    flips = torch.zeros(len(kl), dtype=torch.bool) if flips is None else torch.tensor(flips)
    return TokenMetrics(kl, flips, torch.tensor(entropy).double(), torch.tensor(reference).double())


def test_percentiles_equal_torch_quantile():
    values = torch.randn(997, dtype=torch.float64)
    for name, found in percentiles(values).items():
        assert found == pytest.approx(float(values.quantile(PERCENTILES[name] / 100)), rel=1e-12)


def test_percentiles_of_one_value_and_of_nan():
    assert set(percentiles(torch.tensor([3.0])).values()) == {3.0}
    assert all(math.isnan(v) for v in percentiles(torch.tensor([3.0, math.nan])).values())


def test_percentiles_with_an_infinite_value():
    found = percentiles(torch.tensor([1.0, 2.0, math.inf]))
    assert found["max"] == math.inf
    assert found["50"] == 2.0


def test_error_is_over_windows():
    mean, error = mean_and_error([torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])])
    assert mean == 4.0
    assert error == pytest.approx(math.sqrt(8) / math.sqrt(2))  # window means 2 and 6


def test_error_of_one_window_takes_tokens_as_independent():
    mean, error = mean_and_error([torch.tensor([1.0, 3.0])])
    assert (mean, error) == (2.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))


def test_figures():
    figures = aggregate(
        [window([0.0, 0.2, 0.4], [False, True, False]), window([0.6, 0.6, 0.6], [True, True, False])]
    )
    assert figures.kl_mean == pytest.approx(0.4)
    assert figures.kl_standard_error == pytest.approx(0.2)
    assert figures.kl_percentiles["max"] == pytest.approx(0.6)
    assert figures.flip_rate == 0.5
    assert figures.flip_standard_error == pytest.approx(math.sqrt(0.25 / 6))
    assert figures.perplexity == pytest.approx(math.exp(1.5))
    assert figures.reference_perplexity == pytest.approx(math.exp(1.25))
    assert figures.log_perplexity_ratio == pytest.approx(0.25)
    assert figures.rms_delta_p == pytest.approx(math.sqrt((math.exp(-2) - math.exp(-1.5)) ** 2 / 2))


def test_enormous_cross_entropy_is_an_infinite_perplexity():
    assert aggregate([window([0.0], entropy=(1e4,), reference=(1.0,))]).perplexity == math.inf
