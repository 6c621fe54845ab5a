"""``torchlamp chat``."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from torchlamp.cli.common import ModelName, Threads, app, one_line_errors, set_threads
from torchlamp.cli.generate import (
    Exact,
    GenerationPolicy,
    SamplingSeed,
    Temperature,
    TopP,
    print_acceptance,
    print_rates,
)
from torchlamp.cli.signals import Terminated, asked_to_stop, exit_code, terminated

if TYPE_CHECKING:
    from torchlamp.evaluation.chat import Chat

_COMMANDS = (
    "/clear begins a new conversation, /stats shows figures, /exit or Ctrl-D ends; Ctrl-C stops an answer"
)


@app.command()
@one_line_errors
def chat(
    model: ModelName,
    policy: GenerationPolicy = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the first message.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of an answer at most.")] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    exact: Exact = False,
    threads: Threads = None,
) -> None:
    """Talk to a model: a message a line; /clear, /stats, /help; an empty line or /exit ends."""
    from torchlamp.evaluation.generation import Sampling, check_tokens, load_for_generation, read_any_policy

    chosen = read_any_policy(policy)
    sampling = Sampling(temperature, top_p, seed)
    check_tokens(tokens)
    set_threads(threads)

    from torchlamp.cli.steps import shown_steps
    from torchlamp.evaluation.chat import Chat

    with shown_steps():
        language_model, tokenizer = load_for_generation(model, chosen, exact=exact)
    talking = Chat(language_model, tokenizer, chosen, system=system, sampling=sampling, exact=exact)
    with talking as talk:
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                __import__("readline")  # lines can be edited and called back
            print(_COMMANDS)
        while message := _read_message():
            if not _obey(message, talk):
                _answer(talk, message, tokens)
        if talk.answered:
            print()
            _print_figures(talk)


def _answer(talk: "Chat", message: str, tokens: int) -> None:
    """Write the answer to a message; Ctrl-C ends it, and at a terminal a refused message isn't the end."""
    try:
        with asked_to_stop() as stop:
            talk.say(message, tokens, _write, stop=stop)
    except ValueError as error:
        if not sys.stdin.isatty():
            raise
        print(f"torchlamp: {error}; /clear begins a new conversation", file=sys.stderr)
        return
    except Terminated:
        raise
    except KeyboardInterrupt:
        pass  # before its first token
    print()
    if terminated():
        raise typer.Exit(exit_code())


def _obey(message: str, talk: "Chat") -> bool:
    """Carry out a command; False if the message is none. A path or a sentence that begins with '/' is a message."""
    if not message.startswith("/") or "/" in message[1:] or " " in message:
        return False
    if message == "/clear":
        talk.clear()
    elif message == "/stats":
        _print_figures(talk)
    else:
        print(_COMMANDS if message in ("/help", "/?") else f"unknown command {message!r}: {_COMMANDS}")
    return True


def _read_message() -> str:
    """A line of the input without its blanks; empty at the end of the input, and for /exit."""
    line = _read_line() if sys.stdin.isatty() else sys.stdin.readline().strip()
    return "" if line in ("/exit", "/quit") else line


def _read_line() -> str:
    """A line that is typed; Ctrl-C throws away what there is of it."""
    while True:
        line = ""
        try:
            line = input("> ")
        except EOFError:
            pass
        except Terminated:
            raise
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")
            continue
        return line.strip()


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _print_figures(talk: "Chat") -> None:
    plural = "" if talk.answered == 1 else "s"
    print(
        f"{talk.answered} token{plural}: {talk.tokens_per_second:.1f} tokens/s behind the messages; "
        f"{talk.held} tokens in the cache"
    )
    print_rates(talk.rates)
    print_acceptance(talk.acceptance)
