"""``torchlamp report`` and ``inspect``: pages for people."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from torchlamp.cli.common import app, one_line_errors


def _need_study(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(f"this needs {', '.join(missing)}: run pip install 'torchlamp[study]'")


@app.command()
@one_line_errors
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR ...", help="Folders of torchlamp sweep.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; the first folder by default.")
    ] = None,
) -> None:
    """Turn the results of sweeps into report.html, one page that works offline, and figures with their data."""
    _need_study("pandas", "plotly", "matplotlib", "jinja2")
    from torchlamp.study.report import report as write_report

    page, *rest = write_report(folders, output)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB) and {len(rest)} files in {page.parent / 'figures'}")
