"""Results as a table for people, drawn by rich."""

import re

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from torchlamp.results.result import Result
from torchlamp.results.result_table import columns, heading, label, notes, rows

__all__ = ["label", "notes", "print_result", "result_table"]


def print_result(result: Result, console: Console) -> None:
    """Print the table of a result, with a heading and notes."""
    console.print(heading(result), style="bold", highlight=False)
    console.print(result_table(result, console.width))
    for line in notes(result):
        console.print(line, style="dim", highlight=False)


#: Columns of figures, right of the policy.
_FIGURES = ("KL\nnats/token", "noise", "KL cut", "flips", "PPL", "RMS Δp", "recom-\nputed", "rows\ntouched")
#: A policy's lines are at least as long, so that most of its parts fit.
_MIN_WIDTH = 16
#: A policy may be broken between two sites, and before an accumulator, a transform or a rule.
_BREAKS = re.compile(r"(?<=, )|(?=[+@])|(?=\.[a-z])")
#: And, where such a part is too long, within it.
_INNER_BREAKS = re.compile(r"(?<=[:=])|(?=/)")


def result_table(result: Result, width: int = 80) -> Table:
    """One row a run, as `torchlamp.results.result_table.rows` gives them; fits `width` columns, 80 or more."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    table.add_column("run", overflow="fold")
    names = columns(result, _FIGURES)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    found = rows(result)
    figures = zip(*(cells[1:] for _, cells in found), strict=True)
    taken = sum(
        1 + max(map(cell_len, (*name.split("\n"), *column)))
        for name, column in zip(names, figures, strict=True)
    )
    room = max(width - taken, _MIN_WIDTH)
    for run, (policy, *cells) in found:
        table.add_row(wrapped(policy, room), *cells, style="bold" if run is result else None)
    return table


def wrapped(policy: str, width: int) -> str:
    """A policy in lines of at most `width` columns, broken between its parts, and within one only if it is longer."""
    parts: list[str] = []
    for part in _BREAKS.split(policy):
        parts += [part] if cell_len(part.rstrip()) <= width else _INNER_BREAKS.split(part)
    lines = [""]
    for part in parts:
        if lines[-1] and cell_len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
