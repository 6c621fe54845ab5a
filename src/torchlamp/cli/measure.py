"""``torchlamp evaluate`` and ``bench``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from torchlamp.cli.common import (
    INTERRUPTED,
    ModelName,
    PolicyOption,
    Threads,
    app,
    one_line_errors,
    read_policy,
    set_threads,
    text_files,
)


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
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE ...", help="UTF-8 text, or 'code', or 'prose': Python's documentation, the default."
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
    seed: Annotated[int, typer.Option(help="Of the random control.")] = 0,
    threads: Threads = None,
) -> None:
    """Compare a policy with float32, plain low precision and a random control on real text."""
    to_stdout = json in ("-", "/dev/stdout")
    output = None if json is None or to_stdout else Path(json).expanduser()
    files = text_files(text or [], more or [])
    chosen = read_policy(policy, accumulate, rule)

    from rich.console import Console

    from torchlamp.data.text import check_context, check_sizes, cut_windows, default_text, find_text
    from torchlamp.results.output import check_writable, write_text

    check_sizes(windows, window_length)
    if output is not None:
        check_writable(output)
    texts = [find_text(str(file)) for file in files]
    if dataset:
        from torchlamp.data.source import check_source

        for spec in dataset:
            check_source(spec)
    elif not texts:
        texts = [default_text()]
    set_threads(threads)

    from torchlamp.cli.progress import reporter
    from torchlamp.evaluation.evaluate import evaluate as run_evaluation
    from torchlamp.models.load import load
    from torchlamp.report.table import print_result

    language_model, tokenizer = load(model)
    check_context(language_model, window_length)
    if dataset:
        from torchlamp.data.datasets import dataset_text

        texts += [dataset_text(spec, tokenizer, windows * window_length) for spec in dataset]
    tokens = cut_windows(tokenizer, texts, windows, window_length)
    with reporter(Console(stderr=True, emoji=False)) as progress:
        result = run_evaluation(
            language_model, tokens, chosen, baselines=baselines, seed=seed, progress=progress,
            model_name=model, text=", ".join(t.name for t in texts),
        )  # fmt: skip
    console = Console(stderr=to_stdout, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)
    # Neither a full disk nor a reader that has gone takes the other copy of the result along.
    try:
        if output is not None:
            write_text(output, result.to_json())
    finally:
        print_result(result, console)
    if to_stdout:
        sys.stdout.write(result.to_json())
    if result.partial:
        print(f"torchlamp: interrupted after {result.windows} of {len(tokens)} windows", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)


@app.command()
@one_line_errors
def bench(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="scores, forward, evaluate, attention, decode or soak.")
    ],
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Also write the figures there.")] = None,
    threads: Threads = None,
) -> None:
    """Time the kernels, a forward pass, or an evaluation, beside float32 and the project's targets."""
    set_threads(threads)
    from torchlamp.bench import turns as benchmarks

    benchmarks.run(name, json)
