"""How a data set is named: a preset of the paper, a hub name, or a local file or folder."""

import difflib
import importlib.util
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torchlamp.models.hub import hub_answers

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
            if loader_of(Path(path)) or path.startswith((".", "/", "~", "\\")) or path.count("/") > 1:
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
            f"name a local file ({', '.join(FORMATS)}) or a folder of them"
        )
    return source


def loader_of(path: Path) -> str | None:
    """The loader of `datasets` for a file of this name, None if there is none."""
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
