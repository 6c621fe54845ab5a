"""``torchlamp cache``: converted copies of models, and low-bit copies of their weights."""

import json as json_module
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated

import typer

from torchlamp.cli.common import app, one_line_errors

if TYPE_CHECKING:
    from torchlamp.models.cache import Entry

_DAY = 86_400

cache_app = typer.Typer(
    name="cache",
    help="List or clear converted models and low-bit copies, which take gigabytes.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.add_typer(cache_app)


@cache_app.command("list")
@one_line_errors
def list_entries(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List converted models and low-bit copies with their sizes and last uses."""
    from torchlamp.models.cache import cache_folder, entries

    found = entries()
    if json:
        records = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "bytes": entry.size,
                "last_use": datetime.fromtimestamp(entry.used, timezone.utc).isoformat(timespec="seconds"),
                "whole": entry.whole,
            }
            for entry in found
        ]
        print(json_module.dumps({"folder": str(cache_folder()), "entries": records}, indent=2))
        return
    width = max((len(entry.name) for entry in found), default=0)
    for entry in found:
        rest = "" if entry.whole else ", never finished"
        print(f"{entry.name:{width}}  {size_words(entry.size):>8}  last used {_ago(entry.used)}{rest}")
    copies = f"{len(found)} cop{'y' if len(found) == 1 else 'ies'}"
    print(f"{copies}, {size_words(sum(entry.size for entry in found))}, in {cache_folder()}")


@cache_app.command("clear")
@one_line_errors
def clear(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME", help="Copies whose names begin so, low-bit ones too; all without any."
        ),
    ] = None,
    unused_days: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Only copies that weren't used for so many days.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete converted models and low-bit copies; the next load makes them anew."""
    from torchlamp.models.cache import entries, remove

    if unused_days is not None and not unused_days >= 0:
        raise ValueError(f"--unused-days {unused_days}: give 0 or more")
    found = entries()
    chosen = [entry for entry in found if _begins(entry, names) and _is_old(entry, unused_days)]
    for name in names or []:
        if not any(_begins(entry, [name]) for entry in found):
            known = ", ".join(entry.name for entry in found) or "none at all"
            raise ValueError(f"no converted copy's name begins with {name!r}; there are: {known}")
    for entry in chosen:
        if not dry_run:
            remove(entry)
        print(f"{'would delete' if dry_run else 'deleted'} {entry.name}, {size_words(entry.size)}")
    verb = "would be free" if dry_run else "freed"
    print(f"{size_words(sum(entry.size for entry in chosen))} {verb}")


def _begins(entry: "Entry", names: list[str] | None) -> bool:
    return not names or any(entry.name.removeprefix(".").startswith(name) for name in names)


def _is_old(entry: "Entry", days: float | None) -> bool:
    return days is None or time.time() - entry.used >= days * _DAY


def size_words(count: int) -> str:
    """Bytes in MB, or from 1000 MB in GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _ago(used: float) -> str:
    days = int(max(0.0, time.time() - used) / _DAY)
    return "today" if days == 0 else "yesterday" if days == 1 else f"{days} days ago"
