import dataclasses
import math

from sample_result import make, whole
from torchlamp.report.table import label, notes, print_result, wrapped
from torchlamp.results.result import Result


def printed(result: Result, width: int = 80) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_result(result, console)
    return console.export_text()


def test_table_fits_a_terminal_and_has_a_row_for_each_run():
    text = printed(whole())
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = {label(r): r for r in (whole(), *whole().comparisons)}
    assert list(rows) == ["ps4+strict:0.1", "float32", "plain ps4", "random control"]
    for name in rows:
        assert name in text
    assert "10x" in text  # 2.5 / 0.25
    assert "1.25x" in text
    assert "dequantised" in text


def test_table_without_baselines_and_with_figures_that_are_not_finite():
    text = printed(
        make(kl_mean=math.nan, kl_standard_error=math.nan, perplexity=math.inf, rms_delta_p=math.nan)
    )
    assert "nan" not in text.lower()
    assert "inf" not in text.lower()


def test_compared_policies_stand_between_plain_and_tested():
    result = whole()
    other = make("compared", policy="ps4+running:0.01", kl_mean=0.5)
    lines = printed(dataclasses.replace(result, comparisons=(*result.comparisons, other))).splitlines()
    names = ("float32", "plain ps4", "ps4+running:0.01", "ps4+strict:0.1", "random control")
    body = lines[2:]
    rows = [next(i for i, line in enumerate(body) if line.startswith(name)) for name in names]
    assert rows == sorted(rows)
    assert "5x" in body[rows[2]]  # 2.5 / 0.5


def test_partial_is_said():
    assert "PARTIAL" in printed(whole(partial=True))
    assert "one window only" in notes(whole(windows=1))[0]


def test_a_policy_breaks_between_its_parts():
    policy = "scores=ps4.center.sort+running:0.03, mlp_up=int8@ps13/promote128+condition-cheap:4"
    lines = wrapped(policy, 24).splitlines()
    assert lines == [
        "scores=ps4.center.sort",
        "+running:0.03,",
        "mlp_up=int8",
        "@ps13/promote128",
        "+condition-cheap:4",
    ]
    assert wrapped(policy, 200) == policy
    assert wrapped("ps4+strict:0.1", 5).splitlines() == ["ps4", "+strict:", "0.1"]  # a number isn't broken
    text = printed(dataclasses.replace(whole(), policy=policy))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("promote128", "+condition-cheap:\n", "running:0.03,", "center"):
        assert part in "\n".join(line.split(" ")[0] for line in text.splitlines()) + "\n"


def test_noise_has_a_column_that_fits_a_terminal():
    result = whole()
    noisy = [dataclasses.replace(r, kl_by_move=[0.2, 0.3], kl_noise=0.0625) for r in result.comparisons]
    text = printed(
        dataclasses.replace(result, comparisons=tuple(noisy), kl_by_move=[0.2, 0.3], kl_noise=0.0625)
    )
    assert max(map(len, text.splitlines())) <= 80
    assert "6e-02" in text
    assert "2 repetitions" in text
    assert "noise" not in printed(result)


def test_the_kernels_are_named():
    for kernels, name, said in (
        ("native", "avx2", "native kernels (avx2)"),
        ("torch twins", None, "torch kernels"),
        ("native", None, "native kernels"),
    ):
        result = make(environment={"threads": 1, "kernels": kernels, "instruction_set": name})
        assert f", {said}, " in " ".join(notes(result))
