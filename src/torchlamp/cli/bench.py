"""``torchlamp bench``."""

from pathlib import Path
from typing import Annotated

import typer

from torchlamp.cli.common import Threads, app, one_line_errors, set_threads


@app.command()
@one_line_errors
def bench(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="scores, forward, evaluate, attention, prompt, decode, engines or soak."
        ),
    ],
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Also write the figures there.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute or less: small sizes, rough figures, nothing judged.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Another model than its own; nothing is judged then."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Time the kernels, a forward pass, or an evaluation, beside float32 and the project's targets."""
    set_threads(threads)
    from torchlamp.bench.run import run

    run(name, json, quick=quick, model=model)
