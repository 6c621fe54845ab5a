"""The rows of a result's table, as strings: the command line, a REPL and a notebook show the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchlamp.plain_table import PlainTable

if TYPE_CHECKING:
    from torchlamp.results.result import Result

NOTHING = "-"
#: The column "noise" is there where it was measured.
COLUMNS = ("run", "KL nats/token", "noise", "KL cut", "flips", "PPL", "RMS Δp", "recomputed", "rows touched")
#: Roles of the rows, from the top.
_ORDER = ("reference", "plain", "compared", "tested", "random-like")


def plain_table(result: Result) -> PlainTable:
    """The table of a result with its comparisons."""
    ordered = rows(result)
    return PlainTable(
        heading(result),
        columns(result),
        [cells for _, cells in ordered],
        notes(result),
        main=_main(result, ordered),
    )


def _main(result: Result, ordered: list[tuple[Result, list[str]]]) -> int:
    return next(number for number, (row, _) in enumerate(ordered) if row is result)


def heading(result: Result) -> str:
    """Model, policy and text, and that the evaluation was interrupted if it was."""
    windows = f"{result.windows} window{'' if result.windows == 1 else 's'}"
    said = f"{result.model}, {result.policy}: {windows} of {result.window_length} tokens of {result.text}"
    return f"PARTIAL (interrupted): {said}" if result.partial else said


def columns(result: Result, names: Sequence[str] = COLUMNS) -> tuple[str, ...]:
    """Those of `COLUMNS`, or other names for them, that the table of this result has."""
    return tuple(name for name in names if name != "noise" or has_noise(result))


def has_noise(result: Result) -> bool:
    """Whether rounding noise was measured."""
    return bool(result.kl_by_move)


def rows(result: Result) -> list[tuple[Result, list[str]]]:
    """Reference, plain low precision, compared policies, tested policy, random control, each with its cells.

    The cells belong to `columns`. "KL cut" is the KL of plain low precision over that of the row.
    """
    runs = sorted([*result.comparisons, result], key=lambda r: _ORDER.index(r.role))
    plain = next((run for run in runs if run.role == "plain"), None)
    found = [(run, _cells(run, plain)) for run in runs]
    if has_noise(result):
        for run, cells in found:
            cells.insert(2, NOTHING if run.role == "reference" else number(run.kl_noise, ".0e"))
    return found


def notes(result: Result) -> list[str]:
    """Lines under the table: the reference, the kind of error bar, noise, tiles, tokens, threads, kernels, seconds."""
    error = (
        "± of the KL: standard error over windows"
        if result.windows > 1
        else "± of the KL: one window only, as if tokens were independent (too small)"
    )
    tokens, threads = result.windows * result.window_length, result.environment.get("threads", "?")
    noise = []
    if has_noise(result):
        noise = [
            f"noise: standard deviation of the KL when every number moves by a unit in the last place, from "
            f"{len(result.kl_by_move)} repetitions."
        ]
    tiles = []
    if result.tile_rates:
        shares = ", ".join(f"{result.tile_rates[name]:.1%}" for name in ("0", "1", "2+"))
        tiles = [
            f"Tiles of 64 keys x 16 rows with 0, 1, 2+ recomputed sub-blocks of 16 keys: {shares}; "
            f"{result.tile_rates['sub_block']:.1%} of sub-blocks; {result.tile_rates['saturated']:.2%} of scores "
            "saturate."
        ]
    kernels = result.environment.get("kernels", "?")
    kernels = {"torch twins": "torch"}.get(kernels, kernels)
    instruction_set = result.environment.get("instruction_set")
    return [
        f"Reference: the same model in float32 (dequantised, where it comes from a GGUF file). {error}.",
        *noise,
        *tiles,
        f"{tokens} tokens, {threads} thread{'' if threads == 1 else 's'}, "
        f"{kernels} kernels{f' ({instruction_set})' if instruction_set else ''}, "
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
        return [label(row), "0", NOTHING, "0%", number(row.perplexity, ".3f"), "0%", NOTHING, NOTHING]
    # A policy without a rule is its own plain run.
    cut = (
        plain.kl_mean / row.kl_mean
        if plain is not None and plain is not row and row.kl_mean > 0
        else math.nan
    )
    return [
        label(row),
        f"{number(row.kl_mean, '.2e')} ±{number(row.kl_standard_error, '.0e')}",
        f"{number(cut, '.3g')}x" if math.isfinite(cut) else NOTHING,
        f"{number(100 * row.flip_rate, '.1f')} ±{number(100 * row.flip_standard_error, '.1f')}%",
        number(row.perplexity, ".3f"),
        _percent(row.rms_delta_p),
        _percent(row.recompute_rate),
        _percent(row.rows_touched),
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%" if math.isfinite(value) else NOTHING


def number(value: float, spec: str) -> str:
    """A formatted number; `NOTHING` where it is not finite."""
    return format(value, spec) if math.isfinite(value) else NOTHING
