"""Results as a table for people, drawn by rich."""

from rich import box
from rich.console import Console
from rich.table import Table

from torchlamp.results.result import Result
from torchlamp.results.result_table import heading, label, notes, rows

__all__ = ["label", "notes", "print_result", "result_table"]


def print_result(result: Result, console: Console) -> None:
    """Print the table of a result, with a heading and notes."""
    console.print(heading(result), style="bold", highlight=False)
    console.print(result_table(result))
    for line in notes(result):
        console.print(line, style="dim", highlight=False)


def result_table(result: Result) -> Table:
    """One row a run, as `torchlamp.results.result_table.rows` gives them; fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    table.add_column("run", overflow="fold")
    for name in ("KL\nnats/token", "KL cut", "flips", "PPL", "RMS Δp", "recom-\nputed", "rows\ntouched"):
        table.add_column(name, justify="right", no_wrap=True)
    for run, cells in rows(result):
        table.add_row(*cells, style="bold" if run is result else None)
    return table
