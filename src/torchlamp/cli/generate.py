"""``torchlamp generate``."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from torchlamp.cli.common import ModelName, Threads, app, one_line_errors, set_threads
from torchlamp.cli.signals import exit_code

GenerationPolicy = Annotated[
    str | None,
    typer.Option(
        help="Stored operands are decoded low-bit ('qkv=int12, lm_head=int8+running:0.001'; the default suits most "
        "models), accumulators are simulated ('ps4+strict:0.1'); docs/policy.md."
    ),
]
Temperature = Annotated[
    float, typer.Option(help="0 takes the most probable token; more draws from the probabilities.")
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Draw from the most probable tokens that reach this share.")
]
SamplingSeed = Annotated[int, typer.Option(help="Of the draws.")]
Exact = Annotated[
    bool,
    typer.Option("--exact", help="Float32's own text: low bits draft, float32 confirms."),
]


@app.command()
@one_line_errors
def generate(
    model: ModelName,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="A message or a text; '-' is standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt from a UTF-8 file instead.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the model's chat template, or continue it as a text. "
            "[default: --chat where the model has a template]",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the message (--chat).")
    ] = None,
    policy: GenerationPolicy = None,
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    exact: Exact = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Run float32 first, and show the first token that differs, if any."),
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(metavar="OUT", help="Write text, tokens and figures there; '-' is standard output."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Answer a message or continue a text; ends with tokens per second, recompute rates and memory."""
    from torchlamp.cli.steps import shown_steps
    from torchlamp.evaluation.generation import Sampling, check_tokens, load_for_generation, read_any_policy
    from torchlamp.evaluation.generation import generate as run_generation
    from torchlamp.results.output import check_writable, write_text

    chosen = read_any_policy(policy)
    sampling = Sampling(temperature, top_p, seed)
    check_tokens(tokens)
    to_stdout = json in ("-", "/dev/stdout")
    output = None if json is None or to_stdout else Path(json).expanduser()
    if output is not None:
        check_writable(output)
    words = read_prompt(prompt, file)
    set_threads(threads)

    with shown_steps():
        language_model, tokenizer = load_for_generation(model, chosen, full_precision=compare, exact=exact)
    out = sys.stderr if to_stdout else sys.stdout

    def write(piece: str) -> None:
        out.write(piece)
        out.flush()

    def run(full_precision: bool) -> Any:
        done = run_generation(
            language_model,
            tokenizer,
            words,
            chosen,
            tokens,
            write,
            full_precision=full_precision,
            chat=chat,
            system=system,
            sampling=sampling,
            exact=exact,
        )
        way = ("exact, drafted " if exact else "") + "under "
        label = "float32" if full_precision else way + ("look-ahead" if chosen is None else str(chosen))
        stopped = ", interrupted" if done.finish == "interrupted" else ""
        plural = "s" if done.tokens > 1 else ""
        print(
            f"\n\n{done.tokens} token{plural} {label}{stopped}: {done.tokens_per_second:.1f} tokens/s behind a prompt "
            f"of {done.prompt_seconds:.2f} s",
            file=out,
        )
        print_rates(done.rates, out)
        print_acceptance(done.acceptance, out)
        if done.memory:
            print(f"memory: {done.memory}", file=out)
        return done

    with shown_steps():
        full = run(True) if compare else None
        low = run(False) if full is None or full.finish != "interrupted" else full
    if full is not None and low.finish != "interrupted":
        print(difference(tokenizer, full.ids, low.ids), file=out)
        if full.tokens_per_second > 0:
            times = low.tokens_per_second / full.tokens_per_second
            print(f"{times:.2f} times the tokens per second of float32", file=out)
    if json is not None:
        asked = {
            "model": model,
            "prompt": words,
            "chat": low.chat,
            "system": system,
            "policy": "float32" if low is full else "look-ahead" if chosen is None else str(chosen),
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "exact": exact,
        }
        beside = {} if full is None or full is low else {"float32": full.to_dict()}
        text = json_module.dumps(asked | low.to_dict() | beside, indent=2, ensure_ascii=False) + "\n"
        if output is None:
            sys.stdout.write(text)
        else:
            write_text(output, text)
    if low.finish == "interrupted":
        raise typer.Exit(exit_code())


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's words: as given, of standard input ("-") or of a file, there without the last line end.

    Raises
    ------
    ValueError
        None or two are given, or it is not UTF-8.
    OSError
        The file can't be read.
    """
    if (prompt is None) == (file is None):
        given = f"prompt {prompt!r} and --file {str(file)!r}: give one" if file else "no prompt: give one"
        raise ValueError(f"{given} of PROMPT, '-' for standard input, and --file FILE")
    if file is not None:
        from torchlamp.data.text import read_text

        return read_text(file).content.removesuffix("\n")
    assert prompt is not None
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}; convert it to UTF-8") from error


def print_rates(rates: dict[str, float], out: Any = None) -> None:
    """One line with the recompute rate of each site, if there is any."""
    if rates:
        print(
            "in full precision: " + ", ".join(f"{site} {rate:.2%}" for site, rate in rates.items()), file=out
        )


def print_acceptance(acceptance: Any, out: Any = None) -> None:
    """One line of what became of drafted tokens, if any were."""
    if acceptance is not None:
        print(f"exact: {acceptance}", file=out)


def difference(tokenizer: Any, full: list[int], low: list[int]) -> str:
    """The first new token that isn't the same, in words."""
    for number, (one, other) in enumerate(zip(full, low, strict=False), start=1):
        if one != other:
            first, second = (repr(tokenizer.decode([token])) for token in (one, other))
            return f"new token {number} differs: float32 gives {first}, look-ahead {second}"
    if len(full) != len(low):
        return f"float32 stops after {len(full)} tokens, look-ahead after {len(low)}; all before are the same"
    return f"all {len(full)} new tokens are the same"
