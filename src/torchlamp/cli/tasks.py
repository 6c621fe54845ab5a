"""``torchlamp lm-eval``."""

from typing import Annotated

import typer

from torchlamp.cli.common import app, one_line_errors
from torchlamp.extras import need_extra


@app.command(
    "lm-eval",
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    },
)
@one_line_errors
def lm_eval(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS ...", help="As for lm_eval itself.")
    ] = None,
) -> None:
    """Run lm-evaluation-harness with the model 'lamp': torchlamp lm-eval --model lamp --tasks ..."""
    need_extra(["lm_eval"], "eval", "torchlamp lm-eval")
    from torchlamp.evaluation.lm_eval import main

    main(arguments or ["--help"])
