"""``torchlamp compare``: results of ``torchlamp evaluate --json`` beside each other, paired."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchlamp.cli.common import app, one_line_errors

if TYPE_CHECKING:
    from torchlamp.results.compare import Difference
    from torchlamp.results.result import Result


@app.command()
@one_line_errors
def compare(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE ...", help="JSON files of torchlamp evaluate, on the same text."),
    ],
    json: Annotated[
        str | None, typer.Option(metavar="OUT", help="Write the differences there; '-' is standard output.")
    ] = None,
) -> None:
    """Paired differences to the first file's policy, with errors, and McNemar's test on flips."""
    from torchlamp.results.compare import compare as difference
    from torchlamp.results.output import check_writable, write_text
    from torchlamp.results.read import read_result

    output = None if json is None or json == "-" else Path(json).expanduser()
    if output is not None:
        check_writable(output)
    results = [read_result(file) for file in files]
    base = results[0]
    found = [difference(base, run) for run in _others(results)]
    if not found:
        raise ValueError(
            f"{str(files[0])!r} holds one run: give a second file, or evaluate with --compare POLICY"
        )
    text = json_module.dumps([_record(d) for d in found], indent=2, ensure_ascii=False) + "\n"
    if json == "-":
        print(text, end="")
        return
    if output is not None:
        write_text(output, text)
    print(_table(base, found))


def _others(results: list["Result"]) -> list["Result"]:
    """Every run but the first file's tested one and the references; tested runs of other files come first."""
    tested = results[1:]
    return [*tested, *(run for result in results for run in result.comparisons if run.role != "reference")]


def _table(base: "Result", found: list["Difference"]) -> Any:
    from torchlamp.plain_table import PlainTable
    from torchlamp.results.result_table import NOTHING, label, number

    def cell(value: float, error: float, scale: float, spec: str, error_spec: str) -> str:
        shown = number(scale * value, spec)
        return shown if shown == NOTHING else f"{shown} ±{number(scale * error, error_spec)}"

    rows = [
        [
            label(d.other),
            cell(d.kl, d.kl_standard_error, 1, "+.2e", ".0e"),
            cell(d.flip, d.flip_standard_error, 100, "+.2f", ".2f"),
            NOTHING if d.only_base is None else f"{d.only_base} / {d.only_other}",
            number(d.mcnemar_p, ".2g"),
            cell(d.log_perplexity, d.log_perplexity_standard_error, 1, "+.2e", ".0e"),
        ]
        for d in found
    ]
    columns = ["minus the base", "KL nats/token", "flips %", "only base / only this", "McNemar p", "ln PPL"]
    windows = f"{base.windows} x {base.window_length} tokens of {base.text}"
    heading = f"Base: {base.model}, {base.policy}, KL {base.kl_mean:.2e}, flips {100 * base.flip_rate:.2f} %; {windows}"
    notes = [
        "±: standard error over windows of the paired differences. McNemar's p takes tokens as independent.",
    ]
    return PlainTable(heading, columns, rows, notes)


def _record(d: "Difference") -> dict[str, Any]:
    from torchlamp.results.result import finite

    record: dict[str, Any] = finite(
        {
            "base": d.base.policy,
            "other": d.other.policy,
            "role": d.other.role,
            "kl_difference": d.kl,
            "kl_standard_error": d.kl_standard_error,
            "flip_difference": d.flip,
            "flip_standard_error": d.flip_standard_error,
            "log_perplexity_difference": d.log_perplexity,
            "log_perplexity_standard_error": d.log_perplexity_standard_error,
            "flips_only_base": d.only_base,
            "flips_only_other": d.only_other,
            "mcnemar_p": d.mcnemar_p,
            "windows": d.base.windows,
            "window_length": d.base.window_length,
        }
    )
    return record
