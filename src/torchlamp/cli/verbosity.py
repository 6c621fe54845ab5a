"""``--quiet`` and ``--verbose``, which every command has."""

import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only: no progress, no notes.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also details, and where in the code an error came from.")
]

#: Of the command that runs.
_level = logging.INFO


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Say what the command writes beside its results. ValueError for both at once."""
    global _level
    if quiet and verbose:
        raise ValueError("--quiet and --verbose: give one of them")
    _level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("torchlamp: %(message)s"))
    logger = logging.getLogger("torchlamp")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(_level)


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return _level == logging.ERROR


def is_verbose() -> bool:
    """Whether an error is to be shown with its traceback."""
    return _level == logging.DEBUG


def error_console() -> "Console":
    """Standard error for progress and notes, silent under ``--quiet``."""
    from rich.console import Console

    return Console(stderr=True, emoji=False, quiet=is_quiet())


def add_options(function: Callable[..., Any], command: Callable[..., Any]) -> None:
    """Give the signature of `function`, from which typer reads options, that of `command` and the two of this file."""
    signature = inspect.signature(command)
    kind = inspect.Parameter.KEYWORD_ONLY
    more = {"quiet": Quiet, "verbose": Verbose}
    added = [inspect.Parameter(name, kind, default=False, annotation=a) for name, a in more.items()]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    function.__annotations__ = {**command.__annotations__, **more}
