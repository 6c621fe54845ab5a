"""The files of the package import each other without a circle, and the public names are where they are said to be."""

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import torchlamp

SOURCES = Path(torchlamp.__file__).parent


def _modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name; a folder's `__init__` has the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements at any depth, functions included; those under `if TYPE_CHECKING` never run and don't count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).split(".")[-1] == "TYPE_CHECKING":
            for other in child.orelse:
                yield from _statements(ast.Module([other], []))
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        else:
            yield from _statements(child)


def _imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of `known` that a file names in its imports.

    `from package import name` counts as an import of the submodule where there is one, else of the package. The
    `__init__` of a folder that runs on the way to a submodule isn't counted: Python runs it first and needs nothing
    from it.
    """
    found = set()
    for statement in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found.update(alias.name for alias in statement.names)
            continue
        base = statement.module or ""
        if statement.level:
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - statement.level + 1]
            base = ".".join([*above, base] if base else above)
        for alias in statement.names:
            submodule = f"{base}.{alias.name}"
            found.add(submodule if submodule in known else base)
    return (found & set(known)) - {name}


def _graph(package: Path) -> dict[str, set[str]]:
    known = _modules(package)
    return {name: _imports(name, path, known) for name, path in known.items()}


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of the graph, first module repeated at its end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])[::-1]
    return []


def test_no_circle_of_files():
    graph = _graph(SOURCES)
    assert len(graph) > 100
    assert sum(map(len, graph.values())) > 300
    assert "torchlamp.arithmetic.formats" in graph["torchlamp.arithmetic.operands"]
    assert not _circle(graph), " -> ".join(_circle(graph))


@pytest.mark.parametrize(
    ("first", "circle"),
    [
        ("from package import second\n", True),
        ("import package.second\n", True),
        ("from .second import name\n", True),
        ("def call():\n    from package.second import name\n", True),
        ("try:\n    from .second import name\nexcept ImportError:\n    pass\n", True),
        ("if TYPE_CHECKING:\n    from .second import name\n", False),
        ("import typing\nif typing.TYPE_CHECKING:\n    pass\nelse:\n    from . import second\n", True),
        ("import torch\n", False),
    ],
)
def test_circles_are_found(tmp_path, first, circle):
    """A circle of two files is seen in each way of writing its import."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "first.py").write_text(first)
    (package / "second.py").write_text("from package.first import call\n")
    assert bool(_circle(_graph(package))) == circle


@pytest.mark.parametrize("name", sorted(torchlamp._HOMES))
def test_a_public_name_is_at_its_home(name):
    home = importlib.import_module(f"torchlamp.{torchlamp._HOMES[name]}")
    assert getattr(torchlamp, name) is getattr(home, name)


def test_all_lists_the_public_names():
    assert torchlamp.__all__ == sorted([*torchlamp._HOMES, "__version__"])
    assert dir(torchlamp) == torchlamp.__all__
    with pytest.raises(AttributeError, match="no attribute 'lookahed'"):
        torchlamp.lookahed  # noqa: B018


def test_names_of_test_files_are_unique():
    """There are no packages in tests/, so that two files of one name would be one module to pytest."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
