"""``torchlamp generate`` and ``torchlamp chat``."""

import sys
from typing import Annotated, Any

import typer

from torchlamp.cli.common import ModelName, Threads, app, one_line_errors, set_threads

GenerationPolicy = Annotated[
    str | None,
    typer.Option(
        help="Stored operands are decoded low-bit ('qkv=int12, lm_head=int8+running:0.001'; the default suits most "
        "models), accumulators are simulated ('ps4+strict:0.1'); docs/policy.md."
    ),
]


@app.command()
@one_line_errors
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    policy: GenerationPolicy = None,
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Run float32 first, and show the first token that differs, if any."),
    ] = False,
    threads: Threads = None,
) -> None:
    """Continue a prompt greedily; ends with tokens per second, recompute rates and memory."""
    from torchlamp.evaluation.generation import generate as run_generation
    from torchlamp.evaluation.generation import read_any_policy

    chosen = read_any_policy(policy)
    set_threads(threads)

    from torchlamp.models.load import load

    language_model, tokenizer = load(model)

    def run(full_precision: bool) -> Any:
        done = run_generation(
            language_model, tokenizer, prompt, chosen, tokens, _write, full_precision=full_precision
        )
        label = "float32" if full_precision else "under " + ("look-ahead" if chosen is None else str(chosen))
        print(
            f"\n\n{done.tokens} tokens {label}: {done.tokens_per_second:.1f} tokens/s behind a prompt of "
            f"{done.prompt_seconds:.2f} s"
        )
        _print_rates(done.rates)
        if done.memory:
            print(f"memory: {done.memory}")
        return done

    if not compare:
        run(False)
        return
    full, low = run(True), run(False)
    print(_difference(tokenizer, full.ids, low.ids))
    if full.tokens_per_second > 0:
        print(f"{low.tokens_per_second / full.tokens_per_second:.2f} times the tokens per second of float32")


@app.command()
@one_line_errors
def chat(
    model: ModelName,
    policy: GenerationPolicy = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the first message.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of an answer at most.")] = 256,
    threads: Threads = None,
) -> None:
    """Talk to a model, greedily: a message a line, an empty one or the end of the input ends."""
    from torchlamp.evaluation.chat import Chat
    from torchlamp.evaluation.generation import read_any_policy

    chosen = read_any_policy(policy)
    set_threads(threads)

    from torchlamp.models.load import load

    with Chat(*load(model), chosen, system=system) as talk:
        while message := _read_message():
            talk.say(message, tokens, _write)
            print()
        if talk.answered:
            print(f"\n{talk.answered} tokens: {talk.tokens_per_second:.1f} tokens/s behind the messages")
            _print_rates(talk.rates)


def _read_message() -> str:
    """A line of the input without its blanks; empty at the end of the input."""
    if sys.stdin.isatty():
        _write("> ")
    return sys.stdin.readline().strip()


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _print_rates(rates: dict[str, float]) -> None:
    if rates:
        print("in full precision: " + ", ".join(f"{site} {rate:.2%}" for site, rate in rates.items()))


def _difference(tokenizer: Any, full: list[int], low: list[int]) -> str:
    """The first new token that isn't the same, in words."""
    for number, (one, other) in enumerate(zip(full, low, strict=False), start=1):
        if one != other:
            first, second = (repr(tokenizer.decode([token])) for token in (one, other))
            return f"new token {number} differs: float32 gives {first}, look-ahead {second}"
    if len(full) != len(low):
        return f"float32 stops after {len(full)} tokens, look-ahead after {len(low)}; all before are the same"
    return f"all {len(full)} new tokens are the same"
