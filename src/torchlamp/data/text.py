"""Text to evaluate on, and how it is cut into windows of tokens."""

import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchlamp.models.quiet import quiet_transformers


@dataclass(frozen=True)
class Text:
    """A text and the name it has in results."""

    name: str
    content: str


def default_text() -> Text:
    """English technical prose that comes with every Python: all topics of `pydoc_data.topics`.

    The topics stand in the order of their names, each without white space at its ends, with one empty line
    between them. The text differs a little between Python versions; a result holds the hash of its tokens.
    """
    from pydoc_data import topics

    content = "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))
    return Text("pydoc_data.topics", content)


#: Modules of the standard library whose sources make the text "code", in its order: plain programs that every
#: Python since 3.10 has as files, the short ones first, together more than 64 windows of 512 tokens.
CODE_MODULES = (
    "copy", "queue", "textwrap", "csv", "shlex", "json.encoder", "calendar", "fractions", "statistics",
    "configparser", "difflib", "dataclasses", "random",
)  # fmt: skip


def code_text() -> Text:
    """Python code that comes with every Python: the sources of `CODE_MODULES`, one empty line between them.

    The sources differ a little between Python versions; a result holds the hash of its tokens.

    Raises
    ------
    OSError
        This Python was installed without the sources.
    """
    parts = []
    for name in CODE_MODULES:
        found = importlib.util.find_spec(name)
        source = found.loader.get_source(name) if found and found.loader else None  # type: ignore[attr-defined]
        if source is None:
            raise OSError(
                f"text 'code' needs the source of the standard library's module {name!r}, which this Python "
                "doesn't have: name a file instead"
            )
        parts.append(source.strip())
    return Text("code", "\n\n".join(parts))


def prose_text() -> Text:
    """`default_text` under its short name."""
    return Text("prose", default_text().content)


#: Texts by name: they come with Python, so every machine has them.
TEXTS: dict[str, Callable[[], Text]] = {"prose": prose_text, "code": code_text}


#: The name of a text that is piped in.
STANDARD_INPUT = "-"


def find_text(name: str) -> Text:
    """The text "prose" or "code", standard input for "-", or else a file (a file that is called so: "./prose").

    Raises
    ------
    OSError
        The file can't be read; the nearest name is suggested.
    ValueError
        It is not UTF-8.
    """
    if name in TEXTS:
        return TEXTS[name]()
    if name == STANDARD_INPUT:
        return _decoded("standard input", sys.stdin.buffer.read())
    try:
        return read_text(name)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(name, TEXTS, n=1)
        raise FileNotFoundError(f"{error}{f'; did you mean {near[0]!r}?' if near else ''}") from error


def read_text(path: str | Path) -> Text:
    """A text file in UTF-8; line ends stay as they are in the file, and a byte-order mark is dropped.

    Raises
    ------
    OSError
        The file can't be read.
    ValueError
        It is not UTF-8; the message says at which byte.
    """
    try:
        raw = Path(path).expanduser().read_bytes()
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"text file {str(path)!r} can't be read: {error.strerror or error}") from error
    return _decoded(str(path), raw)


def _decoded(name: str, raw: bytes) -> Text:
    """A text from its bytes in UTF-8, without a byte-order mark. ValueError for other bytes."""
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {name!r} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start} "
            "can't be read; convert it to UTF-8"
        ) from error
    return Text(name, content.removeprefix("\ufeff"))


def cut_windows(tokenizer: Any, texts: Sequence[Text], count: int = 8, length: int = 512) -> Tensor:
    """Cut the start of each text into consecutive, non-overlapping windows.

    Each text is tokenised once, as a whole, with the tokenizer's default special tokens, so a leading special
    token appears in a text's first window only.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The model's own.
    texts : sequence of Text
        At least one.
    count : int
        Windows of each text, at least 1.
    length : int
        Tokens of a window, at least 2 (every token but the first is predicted).

    Returns
    -------
    Tensor
        int64 (texts * count, length), in the order of the texts.

    Raises
    ------
    ValueError
        A text is too short, and then the message says how many tokens it has; count or length is out of
        range.
    """
    check_sizes(count, length)
    rows = [_tokens(tokenizer, text, count, length).view(count, length) for text in texts]
    if not rows:
        raise ValueError("no text given: at least one is needed")
    return torch.cat(rows)


def check_sizes(count: int, length: int) -> None:
    """ValueError if `count` windows of `length` tokens can't be cut from any text."""
    if count < 1:
        raise ValueError(f"{count} windows: at least 1 is needed")
    if length < 2:
        raise ValueError(
            f"window length {length}: a window needs at least 2 tokens, one to see and one to predict"
        )


def context_length(model: Any) -> int | None:
    """The most tokens that a model's positions reach; None where its configuration doesn't say."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def check_context(model: Any, length: int, what: str = "window length") -> None:
    """ValueError if `length` tokens don't fit the model's context; `what` says in the message what is long."""
    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(
            f"{what} {length} is longer than the model's context of {context} tokens: give at most {context}"
        )


def _tokens(tokenizer: Any, text: Text, count: int, length: int) -> Tensor:
    with quiet_transformers():
        tokens = tokenizer(text.content)["input_ids"]
    if len(tokens) < count * length:
        possible, windows = len(tokens) // length, f"{count} window{'' if count == 1 else 's'}"
        advice = f"at most {possible} of that length fit"
        if not possible:
            advice = "give a longer text" + (" or shorter windows" if len(tokens) > 1 else "")
        raise ValueError(
            f"text {text.name!r} has {len(tokens)} tokens, but {windows} of {length} need "
            f"{count * length}: {advice}"
        )
    return torch.tensor(tokens[: count * length], dtype=torch.int64)
