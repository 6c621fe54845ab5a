"""What the commands share: the application, its options, one-line errors."""

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import torchlamp
from torchlamp.cli.help import HelpGroup
from torchlamp.cli.signals import exit_code, process_ends_with_command, signals_of_command, word
from torchlamp.cli.verbosity import add_options, is_verbose, set_verbosity
from torchlamp.models.memory import is_out_of_memory

#: More threads than this are a slip of the keyboard on any machine, and torch takes no number beyond 2^31.
MAX_THREADS = 1024
#: Generators take 64 bits, and windows, layers and sites add to a seed.
MAX_SEED = 2**62

app = typer.Typer(
    name="torchlamp",
    help="Look-ahead mixed precision (LAMP) for transformer inference: how narrow may an accumulator be?",
    cls=HelpGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _complete_model(incomplete: str) -> list[str]:
    """Short names of models, GGUF files and folders that begin so, for a shell that completes."""
    from torchlamp.models.packaged import PACKAGED

    home = Path(incomplete)
    folder = home if incomplete.endswith("/") else home.parent
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = [str(file) + "/" * file.is_dir() for file in files if file.is_dir() or file.suffix == ".gguf"]
    return [name for name in (*PACKAGED, *paths) if name.startswith(incomplete)]


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2-135m, gemma3-270m, a .gguf file, a folder, or a hub name.",
        autocompletion=_complete_model,
    ),
]
Threads = Annotated[int | None, typer.Option(help="Processor threads; torch's choice by default.")]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        help="Operand, accumulator, transforms and rule per site (docs/policy.md): 'ps4+strict:0.1', "
        "'scores=ps4+strict:0.1, mlp_up=int8'."
    ),
]


def main() -> None:
    """Entry point of the console script."""
    process_ends_with_command()
    app()


def _fail(message: str) -> NoReturn:
    print(f"torchlamp: error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that a user can mend into one line and exit code 2, Ctrl-C and SIGTERM into 130 and 143.

    Adds the options ``--quiet`` and ``--verbose``; with the latter an error's traceback stands before its line.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool = False, verbose: bool = False, **kwargs: Any) -> None:
        with signals_of_command():
            try:
                set_verbosity(quiet, verbose)
                command(*args, **kwargs)
            except BrokenPipeError:
                raise  # whoever read standard output wants no more, as `head` does: click ends without a word
            except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
                if is_verbose():
                    traceback.print_exc()
                _fail(str(error) or type(error).__name__)
            except RuntimeError as error:  # torch's kind of MemoryError
                if not is_out_of_memory(error):
                    raise
                if is_verbose():
                    traceback.print_exc()
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                _fail(f"the memory is full ({reason}): close other programs, or ask for less")
            except KeyboardInterrupt:
                print(f"torchlamp: {word()}", file=sys.stderr)
                raise typer.Exit(exit_code()) from None

    add_options(wrapped, command)
    return wrapped


def _print_version(wanted: bool) -> None:
    if wanted:
        print(torchlamp.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Hold the options that come before a command."""


def read_policy(policy: str | None, accumulate: str | None, rule: str | None) -> Any:
    """The policy that ``--policy``, or else ``--accumulate`` and ``--rule``, spell."""
    if policy is not None and (accumulate is not None or rule is not None):
        raise ValueError(
            f"--policy {policy!r} already names accumulator and rule: leave out --accumulate and --rule"
        )
    from torchlamp.policy.policy import Policy

    if policy is not None:
        return Policy.parse(policy)
    return Policy(
        accumulate="ps4" if accumulate is None else accumulate, rule="strict:0.1" if rule is None else rule
    )


def text_files(named: list[Path], more: list[Path]) -> list[Path]:
    """Both ``--text A B`` and ``--text A --text B``; mixing them would lose the order, so it is refused."""
    if more and not named:
        raise ValueError(f"unexpected argument {str(more[0])!r}: text files go behind --text")
    if more and len(named) > 1:
        raise ValueError(
            f"unexpected argument {str(more[0])!r}: write --text before each file, or once before all of them"
        )
    return [*named, *more]


def check_seed(seed: int) -> None:
    """ValueError for a seed that no generator takes, before anything is loaded."""
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed {seed}: give 0 or more, and less than 2^62")


def check_threads(threads: int | None) -> None:
    """ValueError for a number of threads that can't be meant."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"--threads {threads}: give 1 to {MAX_THREADS}")


def set_threads(threads: int | None) -> None:
    """Give torch so many threads, None leaves its choice."""
    check_threads(threads)
    if threads is None:
        return
    import torch

    torch.set_num_threads(threads)
