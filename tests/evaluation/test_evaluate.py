import dataclasses
import math

import pytest
import torch

from tiny import CONTEXT, TEXT
from torchlamp.data.text import Text, cut_windows
from torchlamp.evaluation.evaluate import evaluate, evaluate_against
from torchlamp.evaluation.inspect import inspect
from torchlamp.evaluation.loop import References
from torchlamp.evaluation.runs import plan_runs
from torchlamp.huggingface.lookahead import attach, detach, lookahead
from torchlamp.huggingface.prepare import prepare
from torchlamp.policy.policy import Policy
from torchlamp.results.result import REFERENCE_POLICY

POLICY = "ps2+strict:0.05"


@pytest.fixture(scope="module")
def windows(tiny) -> torch.Tensor:
    return cut_windows(tiny[1], [Text("fox", TEXT)], 3, 24)


def figures(result) -> dict:
    """What must not depend on time."""
    record = dataclasses.asdict(result)
    for entry in (record, *record["comparisons"]):
        for key in ("seconds", "forward_seconds", "environment"):
            del entry[key]
    return record


def test_against_separate_forwards(tiny, windows):
    model = tiny[0]
    result = evaluate(model, windows, POLICY, text="fox")
    kl, flips, entropies, selected, eligible = [], [], [], 0, 0
    with torch.inference_mode():
        for window in windows:
            p = torch.log_softmax(model(window[None]).logits[0].double(), -1)
            with lookahead(model, POLICY) as statistics:
                q = torch.log_softmax(model(window[None]).logits[0].double(), -1)
            kl.append((p.exp() * (p - q)).sum(-1))
            flips.append(p.argmax(-1) != q.argmax(-1))
            entropies.append([-x[:-1].gather(1, window[1:, None]).mean() for x in (p, q)])
            selected, eligible = selected + statistics.selected, eligible + statistics.eligible
    means = torch.stack([k.mean() for k in kl])
    assert result.kl_mean == pytest.approx(float(means.mean()), rel=1e-9)
    assert result.kl_mean > 1e-6
    assert result.kl_standard_error == pytest.approx(float(means.std()) / math.sqrt(3), rel=1e-9)
    assert result.kl_percentiles["max"] == pytest.approx(float(torch.cat(kl).max()), rel=1e-9)
    assert result.flip_rate == pytest.approx(float(torch.cat(flips).double().mean()))
    reference, tested = (torch.stack([e[i] for e in entropies]).mean().exp() for i in (0, 1))
    assert result.reference_perplexity == pytest.approx(float(reference), rel=1e-12)
    assert result.perplexity == pytest.approx(float(tested), rel=1e-12)
    assert result.recompute_rate == selected / eligible
    assert 0 < result.recompute_rate < 1
    assert len(result.recompute_rate_by_layer) == 2
    assert (result.windows, result.window_length, result.policy, result.text) == (3, 24, POLICY, "fox")
    assert not result.partial
    assert 0 < result.forward_seconds < result.seconds


def test_comparisons(tiny, windows):
    result = evaluate(tiny[0], windows, POLICY)
    assert [(c.role, c.policy) for c in result.comparisons] == [
        ("reference", REFERENCE_POLICY),
        ("plain", "ps2+none"),
        ("random-like", "ps2+random-like:strict:0.05"),
    ]
    reference, plain, control = result.comparisons
    assert (reference.kl_mean, reference.flip_rate) == (0, 0)
    assert reference.perplexity == result.reference_perplexity == plain.reference_perplexity
    assert plain.recompute_rate == plain.rows_touched == 0
    assert control.recompute_rate == pytest.approx(result.recompute_rate, rel=0.2)


@pytest.mark.parametrize("baselines", [True, False])
def test_compared_policies_have_the_figures_of_an_evaluation_of_their_own(tiny, windows, baselines):
    other = "ps3+running:0.01"
    result = evaluate(tiny[0], windows, POLICY, compare=[other, POLICY, "ps2+none"], baselines=baselines)
    roles = [(c.role, c.policy) for c in result.comparisons if c.role in ("plain", "compared")]
    plain = ("plain" if baselines else "compared", "ps2+none")
    # The tested policy, and one that is a baseline already, don't run twice.
    assert sorted(roles) == sorted([("compared", other), plain])
    alone = figures(evaluate(tiny[0], windows, other, baselines=False))
    found = figures(next(c for c in result.comparisons if c.policy == other))
    assert found == alone | {"role": "compared"}


def test_no_baselines_and_the_same_figures(tiny, windows):
    alone = evaluate(tiny[0], windows, POLICY, baselines=False)
    assert alone.comparisons == ()
    whole = figures(evaluate(tiny[0], windows, POLICY)) | {"comparisons": ()}
    assert figures(alone) == whole


@pytest.mark.parametrize(
    ("policy", "roles"),
    [
        ("ps4+strict:0.1", ["tested", "plain", "random-like"]),
        ("ps4+none", ["tested"]),
        ("ps4+all", ["tested", "plain"]),
        ("ps4+random:0.1", ["tested", "plain"]),
        ("ps4+random-like:strict:0.1", ["tested", "plain"]),
        ("scores=ps4+none, mlp_up=ps7+strict:1", ["tested", "plain", "random-like"]),
    ],
)
def test_baselines_that_would_say_nothing_are_left_out(policy, roles):
    assert [run.role for run in plan_runs(Policy.parse(policy), True)] == roles
    assert [run.role for run in plan_runs(Policy.parse(policy), False)] == ["tested"]


def test_plain_has_no_transforms_and_the_control_keeps_them():
    runs = plan_runs(Policy.parse("ps4.center.sort+strict:0.1"), True, [Policy.parse("ps4+strict:0.1")])
    assert [(run.role, str(run.policy)) for run in runs] == [
        ("tested", "ps4.center.sort+strict:0.1"),
        ("plain", "ps4+none"),
        ("compared", "ps4+strict:0.1"),
        ("random-like", "ps4.center.sort+random-like:strict:0.1"),
    ]


def test_figures_by_window_head_and_position(tiny, windows):
    result = evaluate(tiny[0], windows, POLICY, baselines=False)
    assert len(result.kl_by_window) == len(result.flip_by_window) == 3
    assert sum(result.kl_by_window) / 3 == pytest.approx(result.kl_mean, rel=1e-5)
    assert sum(result.flip_by_window) / 3 == pytest.approx(result.flip_rate, rel=1e-5)
    assert [len(heads) for heads in result.recompute_rate_by_head] == [4, 4]
    layers = [sum(heads) / 4 for heads in result.recompute_rate_by_head]
    assert layers == pytest.approx(result.recompute_rate_by_layer, rel=1e-5)
    # 24 positions in bins of 16: position i sees i + 1 keys.
    first, second = result.recompute_rate_by_position
    eligible = (sum(range(1, 17)), sum(range(17, 25)))
    mean = (first * eligible[0] + second * eligible[1]) / sum(eligible)
    assert mean == pytest.approx(result.recompute_rate, rel=1e-5)


def test_sites_and_blocks(tiny, windows):
    policy = "scores=ps2+strict:0.05, mlp_up=ps3+none"
    result = evaluate(tiny[0], windows, policy, baselines=False, blocks=True)
    selected = eligible = 0
    for index, window in enumerate(windows):
        with torch.inference_mode(), lookahead(tiny[0], policy, seed=index, blocks=True) as statistics:
            tiny[0](window[None])
        counts = statistics.block_counts
        selected, eligible = selected + counts[:, 1], eligible + counts[:, 0]
    rates = (selected / eligible).tolist()
    assert result.block_rates["row_block_16"] == pytest.approx(rates[0], rel=1e-5)
    assert result.block_rates["tile_16x16"] == pytest.approx(rates[1], rel=1e-5)
    assert result.block_rates["entry"] == result.recompute_rate_by_site["scores"] > 0
    assert result.recompute_rate_by_site.keys() == {"scores", "mlp_up"}
    assert result.recompute_rate_by_site["mlp_up"] == 0
    assert 0 < result.recompute_rate < result.recompute_rate_by_site["scores"]
    assert evaluate(tiny[0], windows, policy, baselines=False).block_rates == {}


def test_one_layer(tiny, windows):
    result = evaluate(tiny[0], windows, POLICY, baselines=False, layers=[1])
    assert result.recompute_rate_by_layer[0] == 0
    assert result.recompute_rate == result.recompute_rate_by_layer[1] > 0
    assert 0 < result.kl_mean < evaluate(tiny[0], windows, POLICY, baselines=False).kl_mean


@pytest.mark.parametrize("budget", [0, 24 * 320 * 4, 24 * 320 * 4 * 3])
def test_shared_references_change_nothing(tiny, windows, budget):
    references = References(tiny[0], windows, budget)
    for policy in (POLICY, "ps3+random:0.2"):
        shared = evaluate_against(references, policy, seed=4)
        assert figures(shared) == figures(evaluate(tiny[0], windows, policy, baselines=False, seed=4))
    assert len(references._kept) == budget // (24 * 320 * 4)


def test_everything_recomputed_is_the_reference(tiny, windows):
    result = evaluate(tiny[0], windows, "ps2+all", baselines=False)
    assert abs(result.kl_mean) < 1e-9
    assert result.recompute_rate == result.rows_touched == 1


def test_results_do_not_depend_on_the_windows_before(tiny, windows):
    policy = "ps2+random:0.3"
    whole = evaluate(tiny[0], windows, policy, baselines=False, seed=5)
    first = evaluate(tiny[0], windows[:1], policy, baselines=False, seed=5)
    third = evaluate(tiny[0], windows[2:], policy, baselines=False, seed=7)
    second = evaluate(tiny[0], windows[1:2], policy, baselines=False, seed=6)
    assert whole.kl_mean == pytest.approx((first.kl_mean + second.kl_mean + third.kl_mean) / 3, rel=1e-12)
    assert evaluate(tiny[0], windows, policy, baselines=False, seed=6).kl_mean != whole.kl_mean


def test_overflowing_format_gives_no_figures_but_a_result(tiny, windows):
    tiny_format = evaluate(tiny[0], windows[:1] * 0 + 3, "e2m1+none", baselines=False)
    assert tiny_format.to_json()


def test_progress(tiny, windows):
    seen = []
    result = evaluate(tiny[0], windows, POLICY, progress=seen.append)
    assert [p.passes for p in seen] == list(range(1, 13))
    assert {p.total_passes for p in seen} == {12}
    assert [p.windows for p in seen] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert math.isnan(seen[0].kl_mean)
    assert seen[-1].kl_mean == pytest.approx(result.kl_mean, rel=1e-12)
    assert seen[-1].kl_standard_error == pytest.approx(result.kl_standard_error, rel=1e-12)
    assert seen[-1].remaining == 0


def interrupt_at(passes: int):
    def callback(progress) -> None:
        if progress.passes == passes:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize(("passes", "finished"), [(4, 1), (5, 1), (7, 1), (8, 2), (9, 2), (11, 2)])
def test_interruption_keeps_the_finished_windows(tiny, windows, passes, finished):
    model = tiny[0]
    implementation = model.config._attn_implementation
    result = evaluate(model, windows, POLICY, progress=interrupt_at(passes))
    assert result.partial
    assert result.windows == finished
    assert model.config._attn_implementation == implementation
    complete = evaluate(model, windows[:finished], POLICY)
    assert figures(result) == figures(dataclasses.replace(complete, partial=True)) | {
        "comparisons": figures(result)["comparisons"]
    }
    assert all(c.partial and c.windows == finished for c in result.comparisons)


def test_full_memory_keeps_the_finished_windows_and_says_so(tiny, windows, caplog):
    def callback(progress):
        if progress.passes == 6:
            raise RuntimeError("can't allocate memory: you tried to allocate 1 byte\nframe 0")

    result = evaluate(tiny[0], windows, POLICY, progress=callback)
    assert result.partial
    assert result.windows == 1
    assert "can't allocate memory" in caplog.text
    assert "frame 0" not in caplog.text


def test_interruption_before_the_first_window_is_raised(tiny, windows):
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny[0], windows, POLICY, progress=interrupt_at(3))


def test_the_model_is_left_as_it_was(tiny, windows):
    model = tiny[0]
    model.train()
    model.model.layers[0].eval()
    try:
        evaluate(model, windows[:1], POLICY)
        assert model.training
        assert model.model.layers[1].mlp.training
        assert not model.model.layers[0].training
    finally:
        model.eval()


def test_bad_windows(tiny, windows):
    model = tiny[0]
    with pytest.raises(TypeError, match="list"):
        evaluate(model, windows.tolist(), POLICY)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        evaluate(model, windows.int(), POLICY)
    for shape in ((24,), (0, 24), (3, 1)):
        with pytest.raises(ValueError, match="shape"):
            evaluate(model, torch.zeros(shape, dtype=torch.int64), POLICY)
    with pytest.raises(ValueError, match=f"context of {CONTEXT}"):
        evaluate(model, torch.zeros(1, CONTEXT + 1, dtype=torch.int64), POLICY)
    with pytest.raises(ValueError, match="holds token 320: the model's vocabulary is 0 to 319"):
        evaluate(model, windows.clamp(min=320), POLICY)
    with pytest.raises(ValueError, match="holds token -1"):
        evaluate(model, windows * 0 - 1, POLICY)


def test_bad_models_policies_and_seeds(tiny, windows):
    model = tiny[0]
    with pytest.raises(TypeError, match="Linear is no transformers model"):
        evaluate(torch.nn.Linear(2, 2), windows, POLICY)
    with pytest.raises(TypeError, match="float64"):
        evaluate(type(model)(model.config).double(), windows, POLICY)
    with lookahead(model, POLICY), pytest.raises(ValueError, match="already runs under 'lamp'"):
        evaluate(model, windows, POLICY)
    with pytest.raises(ValueError, match="strickt"):
        evaluate(model, windows, "ps4+strickt:1")
    with pytest.raises(ValueError, match="layers"):
        evaluate(model, windows, POLICY, layers=[2])
    with pytest.raises(ValueError, match="seed -1"):
        evaluate(model, windows, POLICY, seed=-1)
    with pytest.raises(TypeError, match=r"seed 1\.5"):
        evaluate(model, windows, POLICY, seed=1.5)


def test_block_rates_are_those_of_the_counted_blocks(tiny) -> None:
    model, _ = tiny
    windows = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    result = evaluate(model, windows, "ps3+strict:0.1", baselines=False, blocks=True)
    with lookahead(model, "ps3+strict:0.1", blocks=True) as statistics:
        model(windows, use_cache=False)
    assert result.block_rates == pytest.approx(statistics.block_rates, rel=1e-5)
    assert set(result.block_rates) == {"entry", "row_block_16", "tile_16x16"}
    assert evaluate(model, windows, "ps3+strict:0.1", baselines=False).block_rates == {}


def test_a_model_that_is_no_float32_reference_is_refused(tiny):
    model, tokenizer = tiny
    windows = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    attach(model, "mlp_up=ps2+none")
    try:
        with pytest.raises(ValueError, match=r"a policy is attached .* call torchlamp.detach\(model\) first"):
            evaluate(model, windows, "ps23+none")
        with pytest.raises(ValueError, match="a policy is attached"):
            inspect(model, tokenizer, "the quick brown fox", "ps4")
    finally:
        detach(model)
    assert evaluate(model, windows, "ps23+none", baselines=False).kl_mean < 1e-8
    with (
        prepare(model, "qkv=int8"),
        pytest.raises(ValueError, match=r"prepared for low-bit decoding.*call undo\(\)"),
    ):
        evaluate(model, windows, "ps23+none")
