"""Text from Hugging Face `datasets`: of the hub, by name or preset, or from local files in the same formats.

The documents of a column are joined without a separator, in their order, as the LAMP paper's code does it, and only
as many are read as the windows need: the hub's data are streamed.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from torchlamp.data.source import FORMATS, Source, check_source, loader_of
from torchlamp.data.text import Text, find_text
from torchlamp.models.conversion import first_line
from torchlamp.models.quiet import quiet_transformers

#: Begins the name of a data set where other texts can be named, too: "dataset:gsm8k" in a sweep.
PREFIX = "dataset:"

#: The branch of a data set on the hub that holds its conversion to Parquet.
_PARQUET = "refs/convert/parquet"
#: Characters read at first for every token that is needed; twice as many when they don't suffice.
_CHARACTERS = 8
#: Tokens read beyond those needed. The text may stop inside a word, and its last tokens are then not those that the
#: whole text has.
_MARGIN = 64


def dataset_text(spec: str | Source, tokenizer: Any, tokens: int) -> Text:
    """The beginning of a data set as one text: its documents one after the other, without a separator.

    Documents are read until the text has `tokens` tokens and a few more, so that the first `tokens` tokens are
    those of the whole data set; a data set that is shorter is read to its end.

    Parameters
    ----------
    spec : str or Source
        A preset (`PRESETS`), a hub name, or a local file or folder; see `Source` for the spelling.
    tokenizer : transformers tokenizer
        The model's own.
    tokens : int
        As many as the windows take: count * length.

    Returns
    -------
    Text
        Its name is the full spelling of the source.

    Raises
    ------
    ValueError
        No such configuration, split or column, a column that doesn't hold text, a damaged file.
    OSError
        The data set doesn't exist or can't be reached.
    """
    source = check_source(spec)
    try:
        with _quiet_datasets():
            return Text(str(source), _beginning(_documents(source), tokenizer, tokens))
    except _ReadError as error:
        raise ValueError(f"data set {str(source)!r}: {error}") from error
    except OSError as error:
        raise OSError(f"data set {str(source)!r} can't be read: {first_line(error)}") from error
    except Exception as error:  # each loader of `datasets` has its own
        raise ValueError(f"data set {str(source)!r} can't be read: {first_line(error)}") from error


def check_text(name: str) -> None:
    """Find out whether `text_by_name` will find a text; raises what `check_source` and `find_text` raise."""
    if name.startswith(PREFIX):
        check_source(name.removeprefix(PREFIX))
    else:
        find_text(name)


def text_by_name(name: str, tokenizer: Any, tokens: int) -> Text:
    """The text "prose", "code", or "dataset:" and a data set, or else a file.

    Parameters
    ----------
    name : str
        As in a sweep's `texts`.
    tokenizer, tokens
        As for `dataset_text`; other texts are read whole.
    """
    if name.startswith(PREFIX):
        return dataset_text(name.removeprefix(PREFIX), tokenizer, tokens)
    return find_text(name)


class _ReadError(ValueError):
    """What is wrong with a data set, in our own words."""


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Within the block `datasets` doesn't log: what goes wrong is said once, by the error that is raised."""
    import datasets  # noqa: F401  its import sets the level

    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _beginning(documents: Iterable[str], tokenizer: Any, tokens: int) -> str:
    """The joined documents, cut where `tokens` + `_MARGIN` tokens are surely there, or whole if they are fewer."""
    rest = iter(documents)
    text, wanted = "", _CHARACTERS * (tokens + _MARGIN)
    while True:
        text, exhausted = _extend(text, rest, wanted)
        if exhausted:
            return text
        with quiet_transformers():
            have = len(tokenizer(text[:wanted])["input_ids"])
        if have >= tokens + _MARGIN:
            return text[:wanted]
        wanted *= 2


def _extend(text: str, documents: Iterator[str], wanted: int) -> tuple[str, bool]:
    """At least `wanted` characters, or all there are and True."""
    parts, size = [text], len(text)
    while size < wanted:
        document = next(documents, None)
        if document is None:
            return "".join(parts), True
        parts.append(document)
        size += len(document)
    return "".join(parts), False


def _documents(source: Source) -> Iterator[str]:
    """The texts of the source's column, empty cells left out."""
    rows = iter(_rows(source))
    first = next(rows, None)
    if first is None:
        return
    column = _column(source, first)
    for row in chain([first], rows):
        yield from _cell(row, column)


def _cell(row: dict[str, Any], column: str) -> Iterator[str]:
    cell = row.get(column)
    if isinstance(cell, str):
        yield cell
    elif cell is not None:
        raise _ReadError(f"column {column!r} holds {type(cell).__name__}, not text")


def _column(source: Source, row: dict[str, Any]) -> str:
    named = ", ".join(map(repr, row))
    if source.column is not None:
        if source.column not in row:
            raise _ReadError(f"no column {source.column!r}; the columns are {named}")
        return source.column
    if "text" in row:
        return "text"
    text = [name for name, cell in row.items() if isinstance(cell, str)]
    if len(text) != 1:
        raise _ReadError(f"say which column holds the text, as in column=NAME; the columns are {named}")
    return text[0]


def _rows(source: Source) -> Iterable[dict[str, Any]]:
    """The rows of the source's split, streamed."""
    found = _open(source)
    if not isinstance(found, dict):
        return found  # type: ignore[no-any-return]
    named = ", ".join(map(repr, found))
    if source.split is not None:
        if source.split not in found:
            raise _ReadError(f"no split {source.split!r}; the splits are {named}")
        return found[source.split]  # type: ignore[no-any-return]
    if "train" in found or len(found) == 1:
        return found["train" if "train" in found else next(iter(found))]  # type: ignore[no-any-return]
    raise _ReadError(f"say which split, as in split=NAME; the splits are {named}")


def _from_hub(source: Source) -> Any:
    """From the hub, or from the hub's own conversion to Parquet where the data set is a script.

    Releases of `datasets` from 4.0 on run no scripts, and some data sets (openwebtext among them) were never moved
    to files. The hub keeps a Parquet copy of most, with a folder for each configuration.
    """
    import datasets

    try:
        return datasets.load_dataset(source.path, source.config, streaming=True)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    return datasets.load_dataset(source.path, data_dir=source.config, revision=_PARQUET, streaming=True)


def _open(source: Source) -> Any:
    """What `datasets` gives: a mapping of splits to iterables of rows, or one iterable."""
    import datasets

    path = Path(source.path).expanduser()
    if not source.local:
        return _from_hub(source)
    if path.is_file():
        if (loader := loader_of(path)) is None:
            raise _ReadError(f"files must end in {', '.join(FORMATS)}, which also may be compressed")
        options = {"keep_linebreaks": True} if loader == "text" else {}
        return datasets.load_dataset(loader, data_files=str(path), streaming=True, **options)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))
    # Without its line ends a text file would lose the separation of its words.
    loaders = {loader_of(file) for file in path.rglob("*") if file.is_file()} - {None}
    options = {"keep_linebreaks": True} if loaders == {"text"} else {}
    return datasets.load_dataset(str(path), source.config, streaming=True, **options)
