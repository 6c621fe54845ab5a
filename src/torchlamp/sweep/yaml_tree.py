"""YAML as a tree of values that remember their lines, so that every error can say where it is."""

import difflib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Deeper than any configuration; an alias that contains itself would never end.
_MAX_DEPTH = 20
#: More values than any configuration; aliases of aliases would multiply without a limit.
_MAX_NODES = 100_000


@dataclass(frozen=True)
class Node:
    """A value of a YAML file: a scalar, a list of nodes, or a dictionary of nodes by their keys."""

    value: Any
    file: str
    line: int

    def error(self, message: str) -> ValueError:
        """An error that names the file and the line of this node."""
        return ValueError(f"{self.file}, line {self.line}: {message}")

    def items(self) -> list["Node"]:
        """The nodes of a list; anything else is taken as a list of one.

        Raises
        ------
        ValueError
            The list is empty.
        """
        if not isinstance(self.value, list):
            return [self]
        if not self.value:
            raise self.error("the list is empty: give at least one value, or leave the key out")
        return self.value

    def mapping(self, allowed: Iterable[str], what: str) -> dict[str, "Node"]:
        """The dictionary of this node, whose keys must be among `allowed`.

        Raises
        ------
        ValueError
            It is no dictionary, or has another key; the nearest one is suggested.
        """
        allowed = list(allowed)
        if not isinstance(self.value, dict):
            raise self.error(
                f"{what} is {self.plain()!r}: keys with values are expected ({', '.join(allowed)})"
            )
        for key, node in self.value.items():
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise node.error(f"unknown key {key!r} in {what}: {hint}the keys are {', '.join(allowed)}")
        return self.value

    def string(self, what: str) -> str:
        """The value as a word or sentence; ValueError for anything else."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error(f"{what} is {self.plain()!r}: a name is expected")
        return self.value.strip()

    def integer(self, what: str, lowest: int) -> int:
        """The value as a whole number of at least `lowest`; ValueError for anything else."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < lowest:
            raise self.error(f"{what} is {self.plain()!r}: a whole number of {lowest} or more is expected")
        return self.value

    def number(self, what: str, low: float, high: float) -> float:
        """The value as a number strictly between two limits; ValueError for anything else.

        YAML 1.1 takes 1e-3, without a point, for a string; here it is a number.
        """
        try:
            number = float(self.value) if not isinstance(self.value, bool) else low
        except (TypeError, ValueError):
            number = low
        if not low < number < high:
            raise self.error(
                f"{what} is {self.plain()!r}: a number greater than {low:g} and less than {high:g} is expected"
            )
        return number

    def plain(self) -> Any:
        """The same value without lines."""
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value


def read_yaml(path: Path) -> Node:
    """Read a YAML file with the safe loader.

    Raises
    ------
    OSError
        The file can't be read.
    ValueError
        It is no YAML, has a repeated key, or is empty: the message holds the line. Or PyYAML isn't installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ValueError(
            "a sweep's configuration needs PyYAML: run pip install 'torchlamp[study]'"
        ) from error
    name = str(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise OSError(f"configuration {name!r} can't be read: {error.strerror or error}") from error
    loader: Any = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise ValueError(f"{name}, line 1: the file is empty: docs/sweep.md has an example")
        return _tree(loader, root, name, 0, itertools.count(1))
    except RecursionError:
        # Brackets in brackets, deeper than PyYAML itself can follow.
        raise ValueError(f"{name}: nested more than {_MAX_DEPTH} deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # A quote or bracket that is never closed: where it opens says more than the end of the file.
        if error.context_mark and any(end in str(error.problem) for end in ("end of stream", "stream end")):
            mark = error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "line 1"
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{name}, {where}: this is no YAML ({problem})") from error
    except yaml.YAMLError as error:  # bytes that are no text, or characters that YAML forbids
        problem = " ".join(str(error).split())
        raise ValueError(f"{name}, line 1: this is no YAML ({problem})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _tree(loader: Any, node: Any, name: str, depth: int, numbers: Iterator[int]) -> Node:
    """The node and what is under it, aliases written out; `numbers` counts the nodes of the whole tree."""
    import yaml

    line = node.start_mark.line + 1
    if next(numbers) > _MAX_NODES:
        raise ValueError(f"{name}, line {line}: more than {_MAX_NODES} values, aliases written out")
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name}, line {line}: nested more than {_MAX_DEPTH} deep")
    if isinstance(node, yaml.SequenceNode):
        return Node([_tree(loader, child, name, depth + 1, numbers) for child in node.value], name, line)
    if isinstance(node, yaml.ScalarNode):
        try:
            return Node(loader.construct_object(node), name, line)
        except ValueError as error:  # 2026-13-40 is a date to YAML, and none in the calendar
            raise ValueError(f"{name}, line {line}: {node.value!r} can't be read: {error}") from error
    entries: dict[str, Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{name}, line {key.start_mark.line + 1}: a key must be a word")
        word, key_line = str(key.value), key.start_mark.line + 1
        if word in entries:
            raise ValueError(
                f"{name}, line {key_line}: key {word!r} appears twice, first in line {entries[word].line}: "
                "give it once"
            )
        child = _tree(loader, value, name, depth + 1, numbers)
        # The line of the key, where a reader looks for it, unless a list follows that has lines of its own.
        entries[word] = Node(child.value, name, key_line)
    return Node(entries, name, line)
