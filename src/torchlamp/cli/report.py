"""``torchlamp report`` and ``inspect``: pages for people."""

from pathlib import Path
from typing import Annotated

import typer

from torchlamp.cli.common import ModelName, Threads, app, one_line_errors, set_threads
from torchlamp.extras import need_extra


@app.command()
@one_line_errors
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR ...", help="Folders of torchlamp sweep, or JSON files of torchlamp evaluate."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; the first (file's) folder by default.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The page's heading.", show_default=False)
    ] = None,
) -> None:
    """Turn results of sweeps or evaluations into report.html, one page for offline use, and figures with their data."""
    need_extra(["pandas", "plotly", "matplotlib", "jinja2"], "study", "torchlamp report")
    from torchlamp.cli.steps import shown_steps
    from torchlamp.report.report import report as write_report

    with shown_steps():
        page, *rest = write_report(folders, output, title)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB) and {len(rest)} files in {page.parent / 'figures'}")


@app.command()
@one_line_errors
def inspect(
    model: ModelName,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A short text, at most 256 tokens.")],
    policy: Annotated[
        str, typer.Option(help="Accumulator and rule, for example 'ps4+running:0.03'.")
    ] = "ps4+running:0.03",
    output: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("inspect.html"),
    threads: Threads = None,
) -> None:
    """Write an interactive page with the attention maps of a text and the scores that a policy recomputes."""
    need_extra(["plotly", "jinja2"], "study", "torchlamp inspect")
    from torchlamp.policy.policy import Policy
    from torchlamp.results.output import check_writable, write_text

    chosen = Policy.parse(policy)
    check_writable(output)
    set_threads(threads)

    from torchlamp.cli.steps import shown_steps
    from torchlamp.evaluation.inspect import inspect as run_inspection
    from torchlamp.models.load import load
    from torchlamp.report.inspect_page import inspect_page

    with shown_steps():
        language_model, tokenizer = load(model)
        seen = run_inspection(language_model, tokenizer, text, chosen)
    write_text(output, inspect_page(seen, model))
    print(
        f"{output} ({output.stat().st_size / 1e6:.1f} MB): {len(seen.tokens)} tokens under {seen.policy}, "
        f"{seen.recompute_rate:.2%} of the scores recomputed"
    )
