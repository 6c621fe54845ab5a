"""Rounding noise: the moves themselves, and how far they move a result."""

import math
import statistics

import pytest
import torch

from tiny import TEXT
from torchlamp.data.text import Text, cut_windows
from torchlamp.evaluation.evaluate import evaluate
from torchlamp.evaluation.loop import inference_in_eval_mode
from torchlamp.evaluation.noise import move_last_bits, moved
from torchlamp.results.result import Result
from torchlamp.results.result_table import columns, rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def windows(tiny) -> torch.Tensor:
    return cut_windows(tiny[1], [Text("fox", TEXT)], 2, 24)


def test_numbers_move_to_a_neighbour_or_stay():
    x = torch.randn(3000, generator=generator()) * torch.logspace(-40, 30, 3000)
    found = move_last_bits(x, generator(1))
    down, up = (torch.nextafter(x, torch.tensor(end)) for end in (-math.inf, math.inf))
    shares = [float((found == y).double().mean()) for y in (down, x, up)]
    assert sum(shares) == pytest.approx(1)
    assert all(0.3 < share < 0.37 for share in shares)
    assert torch.equal(
        move_last_bits(x.view(3, -1).T, generator(1)), move_last_bits(x.view(3, -1).T.clone(), generator(1))
    )


def test_zeros_infinities_nan_and_the_largest_number_stay():
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan]).repeat(50)
    found = move_last_bits(x, generator())
    assert torch.equal(found.view(torch.int32), x.view(torch.int32))
    assert bool(move_last_bits(torch.full((100,), largest), generator()).isfinite().all())


def test_every_layer_is_moved_and_nothing_stays_behind(tiny, windows):
    model, ids = tiny[0], windows[:1]
    called = []
    with inference_in_eval_mode(model):
        before = model(ids).logits
        with moved(model, generator()):
            watched = [
                m for name, m in model.named_modules() if name.endswith(("down_proj", "o_proj", "norm"))
            ]
            hooks = [m.register_forward_hook(lambda m, _, out: called.append(m)) for m in watched]
            within = model(ids).logits
            again = model(ids).logits
            for hook in hooks:
                hook.remove()
        after = model(ids).logits
    assert set(called) == set(watched)
    assert torch.equal(before, after)
    # By some units in the last place, and differently each time.
    assert 0 < float((within - before).abs().max()) < 1e-4 * float(before.abs().max())
    assert not torch.equal(within, again)
    assert not any(module._forward_hooks for module in model.modules())


def test_noise_beside_the_standard_error(tiny, windows):
    result = evaluate(tiny[0], windows, "ps2+strict:0.05", noise=3, compare=["ps23+none"])
    assert evaluate(tiny[0], windows, "ps2+strict:0.05", noise=3).kl_by_move == result.kl_by_move
    for run in (result, *result.comparisons):
        if run.role == "reference":
            assert run.kl_by_move == []
            continue
        assert len(set(run.kl_by_move)) == len(run.kl_by_move) == 3
        assert run.kl_noise == pytest.approx(statistics.stdev([run.kl_mean, *run.kl_by_move]), rel=1e-4)
    assert Result.from_json(result.to_json()).kl_by_move == result.kl_by_move


def test_a_narrow_sum_makes_more_of_an_ulp_than_float32(tiny):
    windows = cut_windows(tiny[1], [Text("fox", TEXT)], 3, 110)
    narrow, wide = (
        evaluate(tiny[0], windows, f"{a}+none", noise=6, baselines=False) for a in ("ps7", "ps23")
    )
    assert 0 < 1e5 * wide.kl_noise < narrow.kl_noise < narrow.kl_mean


def test_the_figures_of_the_runs_themselves_are_those_without_noise(tiny, windows):
    found = [evaluate(tiny[0], windows, "ps2+random:0.1", noise=n) for n in (0, 2)]
    assert found[0].kl_mean == found[1].kl_mean
    assert found[0].recompute_rate == found[1].recompute_rate
    assert found[0].comparisons[1].kl_by_window == found[1].comparisons[1].kl_by_window
    assert math.isnan(found[0].kl_noise)


def test_progress_counts_the_repetitions(tiny, windows):
    states = []
    evaluate(tiny[0], windows, "ps2+none", noise=2, progress=states.append)
    assert [state.passes for state in states] == list(range(1, states[-1].total_passes + 1))
    assert states[-1].windows == states[-1].total_windows == 2


def test_the_table_has_a_column_of_noise_where_it_was_measured(tiny, windows):
    without, with_noise = (evaluate(tiny[0], windows, "ps2+none", noise=n, baselines=False) for n in (0, 2))
    assert "noise" in columns(with_noise)
    assert "noise" not in columns(without)
    assert all(len(cells) == len(columns(r)) for r in (without, with_noise) for _, cells in rows(r))
    said = repr(with_noise)
    assert "2 repetitions" in said
    assert f"{with_noise.kl_noise:.0e}" in said
    assert "repetitions" not in repr(without)


@pytest.mark.parametrize(
    ("noise", "error"), [(-1, ValueError), (1001, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_wrong_numbers_of_repetitions(tiny, windows, noise, error):
    with pytest.raises(error, match="noise"):
        evaluate(tiny[0], windows, "ps4", noise=noise)
