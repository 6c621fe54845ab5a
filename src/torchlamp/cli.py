"""The command ``torchlamp``. Heavy imports stay inside the commands, so that help comes at once."""

import functools
import json as json_module
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

import torchlamp

P = ParamSpec("P")
INTERRUPTED = 130
#: More threads than this are a slip of the keyboard on any machine, and torch takes no number beyond 2^31.
MOST_THREADS = 1024

app = typer.Typer(
    name="torchlamp",
    help="Look-ahead mixed precision (LAMP) for transformer inference: how narrow may an accumulator be?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="smollm2-135m, gemma3-270m, a .gguf file, a folder, or a hub name."),
]
Threads = Annotated[int | None, typer.Option(help="Processor threads; torch's choice by default.")]
PolicyOption = Annotated[
    str | None, typer.Option(help="Accumulator and rule per site, for example 'scores=ps4+strict:0.1'.")
]


def main() -> None:
    """Entry point of the console script."""
    app()


def _fail(message: str) -> NoReturn:
    print(f"torchlamp: error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2)


def _one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors that a user can mend into one line and exit code 2, and Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("torchlamp: %(message)s"))
        logger = logging.getLogger("torchlamp")
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            _fail(str(error) or type(error).__name__)
        except KeyboardInterrupt:
            print("torchlamp: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

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


@app.command()
@_one_line_errors
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
        typer.Option(metavar="FILE ...", help="UTF-8 text; Python's own documentation by default."),
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
    files = _text_files(text or [], more or [])
    chosen = _policy(policy, accumulate, rule)

    from rich.console import Console

    from torchlamp.study.output import check_writable, write_text
    from torchlamp.study.text import check_context, check_sizes, cut_windows, default_text, read_text

    check_sizes(windows, window_length)
    if output is not None:
        check_writable(output)
    texts = [read_text(file) for file in files] or [default_text()]
    _set_threads(threads)

    from torchlamp.study.evaluate import evaluate as run_evaluation
    from torchlamp.study.models import load
    from torchlamp.study.reporter import reporter
    from torchlamp.study.table import print_result

    language_model, tokenizer = load(model)
    check_context(language_model, window_length)
    tokens = cut_windows(tokenizer, texts, windows, window_length)
    with reporter(Console(stderr=True)) as progress:
        result = run_evaluation(
            language_model, tokens, chosen, baselines=baselines, seed=seed, progress=progress,
            model_name=model, text=", ".join(t.name for t in texts),
        )  # fmt: skip
    console = Console(stderr=to_stdout)
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
@_one_line_errors
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    policy: PolicyOption = None,
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    threads: Threads = None,
) -> None:
    """Continue a prompt greedily under a policy; ends with tokens per second and the recompute rate."""
    chosen = _policy(policy, None, None)
    _set_threads(threads)

    from torchlamp.study.generation import generate as run_generation
    from torchlamp.study.models import load

    language_model, tokenizer = load(model)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    done = run_generation(language_model, tokenizer, prompt, chosen, tokens, write)
    print(
        f"\n\n{done.tokens} tokens in {done.seconds:.2f} s ({done.tokens_per_second:.1f} tokens/s) "
        f"under {chosen}, {done.recompute_rate:.2%} of the scores recomputed"
    )


@app.command()
@_one_line_errors
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="scores, forward or evaluate.")],
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Also write the figures there.")] = None,
    threads: Threads = None,
) -> None:
    """Time the kernels, a forward pass, or an evaluation, beside float32 and the project's targets."""
    _set_threads(threads)
    from torchlamp.study import bench as benchmarks

    benchmarks.run(name, json)


@app.command()
@_one_line_errors
def info(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show versions, threads, the processor, which kernels run and why others don't, and the cache."""
    from torchlamp.study.cache import cache_folder
    from torchlamp.study.environment import environment, kernels

    record: dict[str, Any] = environment()
    record["kernels"] = kernels()
    record["cache_folder"] = str(cache_folder())
    if json:
        print(json_module.dumps(record, indent=2))
        return
    native = record.pop("kernels")
    record["kernels"] = "native" if native["native"] else f"torch twins (slow), because {native['why_not']}"
    record |= {f"kernel {name}": state for name, state in native["features"].items()}
    record["cpu_features"] = " ".join(record["cpu_features"]) or "unknown"
    width = max(map(len, record))
    for key, value in record.items():
        print(f"{key.replace('_', ' '):{width}}  {'none' if value is None else value}")


@app.command()
@_one_line_errors
def models() -> None:
    """List the models with short names: installed or how to install them, and what the cache holds."""
    from torchlamp.study.cache import cache_folder, entry_size
    from torchlamp.study.models import cache_entry
    from torchlamp.study.packaged import PACKAGED

    for name, packaged in PACKAGED.items():
        print(f"{name}  {packaged.description}")
        if (version := packaged.installed()) is None:
            print(f"    not installed; run: {packaged.install}")
            continue
        size = entry_size(cache_entry(name))
        print(f"    package {packaged.distribution} {version} installed")
        print(
            f"    converted copy: {size / 1e6:.0f} MB"
            if size
            else "    converted copy: none yet, the first load makes one"
        )
    print(
        "Also: any .gguf file, a transformers folder, or a hub name. "
        f"Converted copies are in {cache_folder()}"
    )


def _policy(policy: str | None, accumulate: str | None, rule: str | None) -> Any:
    if policy is not None and (accumulate is not None or rule is not None):
        raise ValueError(
            f"--policy {policy!r} already names accumulator and rule: leave out --accumulate and --rule"
        )
    from torchlamp.compositions.policy import Policy

    if policy is not None:
        return Policy.parse(policy)
    return Policy(
        accumulate="ps4" if accumulate is None else accumulate, rule="strict:0.1" if rule is None else rule
    )


def _text_files(named: list[Path], more: list[Path]) -> list[Path]:
    """Both ``--text A B`` and ``--text A --text B``; mixing them would lose the order, so it is refused."""
    if more and not named:
        raise ValueError(f"unexpected argument {str(more[0])!r}: text files go behind --text")
    if more and len(named) > 1:
        raise ValueError(
            f"unexpected argument {str(more[0])!r}: write --text before each file, or once before all of them"
        )
    return [*named, *more]


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"--threads {threads}: give 1 to {MOST_THREADS}")
    import torch

    torch.set_num_threads(threads)
