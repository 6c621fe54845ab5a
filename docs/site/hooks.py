"""What mkdocs does beside its settings: pages from files outside docs, notebooks, and links that lead out of docs."""

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
#: Pages of the site that are files of the repository's root.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
#: In their place in the site a link to the list of pages leads home.
PAGES["docs/README.md"] = "index.md"
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and every file that a page links to outside docs."""
    for source, target in PAGES.items():
        if source.count("/") == 0:
            files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference.md", content=reference()))
    for notebook in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        files.append(File.generated(config, f"tutorials/{notebook.stem}.md", content=page_of(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site has them; what has no page keeps its text without a link."""
    home = _home(page.file.src_uri)
    start = posixpath.dirname(page.file.src_uri) or "."

    def mended(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, hash_, anchor = target.partition("#")
        found = posixpath.normpath(posixpath.join(posixpath.dirname(home), path))
        place = PAGES.get(found, found.removeprefix("docs/") if found.startswith("docs/") else None)
        if place is None or files.get_file_from_path(place) is None:
            return text if (ROOT / found).exists() else match[0]
        return f"{image}[{text}]({posixpath.relpath(place, start)}{hash_}{anchor})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if number % 2 else _LINK.sub(mended, part) for number, part in enumerate(parts))


def _home(source: str) -> str:
    """The path in the repository of a page's file."""
    return next(
        (file for file, page in PAGES.items() if page == source and "/" not in file), f"docs/{source}"
    )


def reference() -> str:
    """A page with the docstrings of every public name, from the table of homes in the package's `__init__`."""
    tree = ast.parse((ROOT / "src" / "torchlamp" / "__init__.py").read_text(encoding="utf-8"))
    tables = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES"
    ]
    homes: dict[str, str] = ast.literal_eval(tables[0])
    names = sorted(homes, key=lambda name: (name[0].isupper(), name.lower()))
    head = "# Reference\n\nEvery public name: `import torchlamp`, then `torchlamp.NAME`.\n\n"
    return head + "\n".join(f"::: torchlamp.{homes[name]}.{name}\n" for name in names)


def page_of(notebook: Path) -> str:
    """A notebook's cells as Markdown, with what they printed."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", [])) for output in cell["outputs"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
