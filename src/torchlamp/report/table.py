"""Results as a table for people, drawn by rich."""

import math

from rich import box
from rich.console import Console
from rich.table import Table

from torchlamp.results.result import Result, Role

_NOTHING = "-"
#: Rows of the table, from the top.
_ORDER: tuple[Role, ...] = ("reference", "plain", "compared", "tested", "random-like")


def print_result(result: Result, console: Console) -> None:
    """Print the table of a result, with a heading and notes."""
    size = f"{result.windows} windows of {result.window_length} tokens of {result.text}"
    heading = f"{result.model}, {result.policy}: {size}"
    console.print(
        f"PARTIAL (interrupted): {heading}" if result.partial else heading, style="bold", highlight=False
    )
    console.print(result_table(result))
    for line in notes(result):
        console.print(line, style="dim", highlight=False)


def result_table(result: Result) -> Table:
    """One row a run: reference, plain low precision, compared policies, tested policy, random control.

    Fits 80 columns. "KL cut" is the KL of plain low precision over that of the row.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    table.add_column("run", overflow="fold")
    for name in ("KL\nnats/token", "KL cut", "flips", "PPL", "RMS Δp", "recom-\nputed", "rows\ntouched"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = sorted([*result.comparisons, result], key=lambda r: _ORDER.index(r.role))
    plain = next((r for r in rows if r.role == "plain"), None)
    for row in rows:
        table.add_row(*_cells(row, plain), style="bold" if row is result else None)
    return table


def notes(result: Result) -> list[str]:
    """Lines under the table: the reference, the kind of error bar, tokens, threads, kernels and seconds."""
    error = (
        "± of the KL: standard error over windows"
        if result.windows > 1
        else "± of the KL: one window only, as if tokens were independent (too small)"
    )
    tokens = result.windows * result.window_length
    return [
        f"Reference: the same model in float32 (dequantised, where it comes from a GGUF file). {error}.",
        f"{tokens} tokens, {result.environment.get('threads', '?')} threads, "
        f"{result.environment.get('kernels', '?')} kernels, "
        f"{result.seconds:.1f} s ({result.forward_seconds:.1f} s in forward passes).",
    ]


def label(result: Result) -> str:
    """Short name of a run."""
    if result.role == "reference":
        return "float32"
    if result.role == "plain":
        return "plain " + ", ".join(part.removesuffix("+none") for part in result.policy.split(", "))
    return "random control" if result.role == "random-like" else result.policy


def _cells(row: Result, plain: Result | None) -> list[str]:
    if row.role == "reference":
        return [label(row), "0", _NOTHING, "0%", _number(row.perplexity, ".3f"), "0%", _NOTHING, _NOTHING]
    # A policy without a rule is its own plain run.
    cut = (
        plain.kl_mean / row.kl_mean
        if plain is not None and plain is not row and row.kl_mean > 0
        else math.nan
    )
    return [
        label(row),
        f"{_number(row.kl_mean, '.2e')} ±{_number(row.kl_standard_error, '.0e')}",
        f"{_number(cut, '.3g')}x" if math.isfinite(cut) else _NOTHING,
        f"{_number(100 * row.flip_rate, '.1f')} ±{_number(100 * row.flip_standard_error, '.1f')}%",
        _number(row.perplexity, ".3f"),
        _percent(row.rms_delta_p),
        _percent(row.recompute_rate),
        _percent(row.rows_touched),
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%" if math.isfinite(value) else _NOTHING


def _number(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else _NOTHING
