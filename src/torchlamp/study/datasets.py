"""Text from Hugging Face `datasets`: of the hub, by name or preset, or from local files in the same formats.

The documents of a column are joined without a separator, in their order, as the LAMP paper's code does it, and only
as many are read as the windows need: the hub's data are streamed.
"""

import difflib
import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from torchlamp.study.conversion import first_line
from torchlamp.study.hub import hub_answers
from torchlamp.study.quiet import quiet_transformers
from torchlamp.study.text import Text

#: Local file endings and the loader of `datasets` that reads them; each may be compressed (.gz, .bz2, .xz, .zst).
FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
#: Characters read at first for every token that is needed; twice as many when they don't suffice.
_CHARACTERS = 8
#: Tokens read beyond those needed. The text may stop inside a word, and its last tokens are then not those that the
#: whole text has.
_MARGIN = 64


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Spelled ``name:config:split:column`` with any end of it left out, and empty where the default serves:
    ``openai/gsm8k:main:test:question``, ``wikitext2::validation``, ``docs.jsonl:::body``. A part may also be
    named, in any order: ``docs.jsonl:column=body``.

    Attributes
    ----------
    path : str
        A name on the hub, or the path of a local file or folder.
    config, split, column : str or None
        None: the data set's only configuration; the split "train", or else the only one; the column "text",
        or else the only one that holds text.
    """

    path: str
    config: str | None = None
    split: str | None = None
    column: str | None = None

    @classmethod
    def parse(cls, spec: "str | Source") -> "Source":
        """Read a spelling; the parts given replace those of a preset.

        Raises
        ------
        ValueError
            An unknown or repeated part, too many of them, or a name that is neither preset, file nor hub name.
        FileNotFoundError
            What looks like a local path isn't there.
        """
        if isinstance(spec, Source):
            return spec
        if spec and Path(spec).expanduser().exists():
            return cls(spec)
        path, *parts = (part.strip() for part in spec.split(":"))
        given = _parts(spec, parts)
        if path in PRESETS:
            return replace(PRESETS[path], **given)
        source = cls(path, **given)
        if not source.local:
            if _loader(Path(path)) or path.startswith((".", "/", "~", "\\")) or path.count("/") > 1:
                raise FileNotFoundError(f"no data set file or folder {path!r}; {_allowed()}")
            if not _HUB_NAME.fullmatch(path):
                raise ValueError(f"data set {spec!r} has no usable name; {_allowed()}")
            if "/" not in path and (near := difflib.get_close_matches(path, PRESETS, n=1)):
                raise ValueError(f"unknown data set {path!r}: did you mean {near[0]!r}? {_allowed()}")
        return source

    @property
    def local(self) -> bool:
        """Whether `path` is a file or folder here."""
        return bool(self.path) and Path(self.path).expanduser().exists()

    def __str__(self) -> str:
        parts = [getattr(self, field.name) or "" for field in fields(self)]
        return ":".join(parts).rstrip(":")


#: The data sets of the LAMP paper by short names, with the columns its code reads.
PRESETS = {
    "openwebtext": Source("Skylion007/openwebtext", split="train", column="text"),
    "codeparrot": Source("codeparrot/codeparrot-clean", split="train", column="content"),
    "arxiv": Source("ccdv/arxiv-summarization", "section", "train", "abstract"),
    "wikitext2": Source("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "gsm8k": Source("openai/gsm8k", "main", "test", "question"),
}


def check_source(spec: str | Source) -> Source:
    """Find out in seconds, and before a model is loaded, whether a data set can be read at all.

    Raises
    ------
    ValueError, FileNotFoundError
        As `Source.parse`; also `datasets` isn't installed (ValueError).
    OSError
        The data set is on the hub, and the hub can't be reached.
    """
    source = Source.parse(spec)
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"data set {str(spec)!r} needs the package datasets: run pip install 'torchlamp[datasets]'"
        )
    if not source.local and not hub_answers():
        raise OSError(
            f"data set {str(source)!r} is on the Hugging Face hub, which can't be reached from here: "
            f"{_allowed()}"
        )
    return source


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


class _ReadError(ValueError):
    """What is wrong with a data set, in our own words."""


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Within the block `datasets` doesn't log: what goes wrong is said once, by the error that is raised."""
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


def _open(source: Source) -> Any:
    """What `datasets` gives: a mapping of splits to iterables of rows, or one iterable."""
    import datasets

    path = Path(source.path).expanduser()
    if not source.local:
        return datasets.load_dataset(source.path, source.config, streaming=True)
    if path.is_file():
        if (loader := _loader(path)) is None:
            raise _ReadError(f"files must end in {', '.join(FORMATS)}, which also may be compressed")
        options = {"keep_linebreaks": True} if loader == "text" else {}
        return datasets.load_dataset(loader, data_files=str(path), streaming=True, **options)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))
    # Without its line ends a text file would lose the separation of its words.
    loaders = {_loader(file) for file in path.rglob("*") if file.is_file()} - {None}
    options = {"keep_linebreaks": True} if loaders == {"text"} else {}
    return datasets.load_dataset(str(path), source.config, streaming=True, **options)


def _loader(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _parts(spec: str, parts: list[str]) -> dict[str, str]:
    """The parts behind the name, by name: those with ``name=`` as named, the others in order."""
    names = [field.name for field in fields(Source)][1:]
    given: dict[str, str] = {}
    for place, part in enumerate(parts):
        name, equals, value = part.partition("=")
        if not equals:
            if place >= len(names):
                raise ValueError(f"data set {spec!r} has too many parts: write name:config:split:column")
            name, value = names[place], part
        if name not in names:
            raise ValueError(f"unknown part {name!r} in data set {spec!r}: the parts are {', '.join(names)}")
        if name in given:
            raise ValueError(f"part {name!r} appears twice in data set {spec!r}: give it once")
        if value:
            given[name] = value
    return given


def _allowed() -> str:
    return (
        f"use a file ({', '.join(FORMATS)}), a folder of them, {', '.join(PRESETS)}, or a hub name such as "
        "'openai/gsm8k:main:test:question'"
    )
