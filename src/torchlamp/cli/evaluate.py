"""``torchlamp evaluate``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchlamp.cli.common import (
    ModelName,
    PolicyOption,
    Threads,
    app,
    check_seed,
    one_line_errors,
    read_policy,
    set_threads,
    text_files,
)
from torchlamp.cli.signals import exit_code, hold_signals, word
from torchlamp.cli.verbosity import error_console

if TYPE_CHECKING:
    from torch import Tensor

    from torchlamp.data.text import Text
    from torchlamp.evaluation.loop import Progress
    from torchlamp.results.result import Result

#: Columns of the table where standard output is no terminal.
_WIDTH = 110


@app.command()
@one_line_errors
def evaluate(
    model: ModelName,
    more: Annotated[list[Path] | None, typer.Argument(hidden=True, metavar=" ")] = None,
    accumulate: Annotated[
        str | None, typer.Option(help="Accumulator of the attention scores. [default: ps4]")
    ] = None,
    rule: Annotated[str | None, typer.Option(help="Which scores to recompute. [default: strict:0.1]")] = None,
    policy: PolicyOption = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="POLICY", help="Another policy, a row beside the tested one. May be repeated."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE ...",
            help="UTF-8 text; '-' is standard input; 'code', or 'prose', Python's documentation, the default.",
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Hugging Face data set: openwebtext, codeparrot, arxiv, wikitext2, gsm8k, a file or folder, or "
            "owner/name:config:split:column. May be repeated.",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows from the start of each text.")] = 8,
    window_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    json: Annotated[
        str | None, typer.Option(metavar="OUT", help="Write the result there; '-' is standard output.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Also run plain low precision and a random control.")
    ] = True,
    noise: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Also run each policy N times with last bits moved at random: how much of its KL is rounding noise.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the random control.")] = 0,
    threads: Threads = None,
) -> None:
    """Compare a policy with float32, plain low precision and a random control on real text."""
    to_stdout = json in ("-", "/dev/stdout")
    output = None if json is None or to_stdout else Path(json).expanduser()
    files = text_files(text or [], more or [])
    chosen = read_policy(policy, accumulate, rule)
    others = [read_policy(spelling, None, None) for spelling in compare or []]
    check_seed(seed)
    texts = _check_inputs(files, dataset or [], windows, window_length, output)
    set_threads(threads)

    from torchlamp.cli.progress import reporter
    from torchlamp.cli.steps import shown_steps
    from torchlamp.evaluation.evaluate import check_noise
    from torchlamp.evaluation.evaluate import evaluate as run_evaluation
    from torchlamp.models.load import load

    check_noise(noise)
    with shown_steps():
        language_model, tokenizer = load(model)
    tokens, names = _cut(language_model, tokenizer, texts, dataset or [], windows, window_length)
    with reporter(error_console()) as shown:

        def progress(state: "Progress") -> None:
            shown(state)
            if state.windows == state.total_windows:
                hold_signals()  # nothing is left to stop

        result = run_evaluation(
            language_model, tokens, chosen, baselines=baselines, compare=others, noise=noise, seed=seed,
            progress=progress, model_name=model, text=names,
        )  # fmt: skip
    hold_signals()
    _show(result, output, to_stdout)
    if result.partial:
        print(f"torchlamp: {word()} after {result.windows} of {len(tokens)} windows", file=sys.stderr)
        raise typer.Exit(exit_code())


def _check_inputs(
    files: list[Path], dataset: list[str], windows: int, window_length: int, output: Path | None
) -> list["Text"]:
    """Check everything that can be checked before the model is loaded.

    Returns
    -------
    list of Text
        The texts of `files`; without any, and without data sets, the default one.

    Raises
    ------
    ValueError
        Impossible sizes, a file that is no text, or a data set's wrong spelling.
    OSError
        A file can't be read, or the output can't be written.
    """
    from torchlamp.data.text import check_sizes, default_text, find_text
    from torchlamp.results.output import check_writable

    check_sizes(windows, window_length)
    if output is not None:
        check_writable(output)
    texts = [find_text(str(file)) for file in files]
    if dataset:
        from torchlamp.data.source import check_source

        for spec in dataset:
            check_source(spec)
    return texts if texts or dataset else [default_text()]


def _cut(
    model: Any, tokenizer: Any, texts: list["Text"], dataset: list[str], windows: int, window_length: int
) -> tuple["Tensor", str]:
    """Windows, int64 (n, window_length), of the texts and then of the data sets; and the names of both, joined.

    ValueError if the model's context is shorter than a window, or a text has too few tokens.
    """
    from torchlamp.data.text import check_context, cut_windows

    check_context(model, window_length)
    if dataset:
        from torchlamp.data.datasets import dataset_text

        texts = texts + [dataset_text(spec, tokenizer, windows * window_length) for spec in dataset]
    return cut_windows(tokenizer, texts, windows, window_length), ", ".join(text.name for text in texts)


def _show(result: "Result", output: Path | None, to_stdout: bool) -> None:
    """Write the JSON where it was asked for, and print the table: to standard error if the JSON goes to stdout."""
    from rich.console import Console

    from torchlamp.report.table import print_result
    from torchlamp.results.output import write_text

    console = Console(stderr=to_stdout, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    # Neither a full disk nor a reader that has gone takes the other copy of the result along.
    try:
        if output is not None:
            write_text(output, result.to_json())
    finally:
        print_result(result, console)
    if to_stdout:
        sys.stdout.write(result.to_json())
