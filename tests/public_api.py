"""The public names with their signatures, a line each; run as a program it writes them to docs/public-api.txt."""

import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import torchlamp

ROOT = Path(__file__).parents[1]
LISTING = ROOT / "docs" / "public-api.txt"


def listing() -> list[str]:
    """Every public name; of a class also its public methods, properties and annotated fields."""
    return [line for name in sorted(torchlamp.__all__) for line in _lines(name, getattr(torchlamp, name))]


def _lines(name: str, found: object) -> Iterator[str]:
    if isinstance(found, str):
        yield name
    elif inspect.isclass(found):
        # A class's own signature is that of its fields, which come below, or of its __init__.
        yield name if hasattr(found, "__dataclass_fields__") else f"{name}{_signature(found)}"
        for member in sorted(_members(found)):
            value = inspect.getattr_static(found, member, None)
            if isinstance(value, classmethod | staticmethod):
                value = value.__func__
            callable_ = inspect.isroutine(value)
            yield f"{name}.{member}{_signature(value)}" if callable_ else f"{name}.{member}"
    else:
        yield f"{name}{_signature(found)}"


def _members(found: type) -> set[str]:
    members = set(getattr(found, "__dataclass_fields__", {}))
    for base in found.__mro__:
        if base.__module__.startswith("torchlamp") and not issubclass(base, enum.Enum):
            members |= set(vars(base))
    return {member for member in members if not member.startswith("_")}


def _signature(function: object) -> str:
    """Parameters and defaults, without annotations: these tell a reader more, and change no caller."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    # An object's address would differ in every process.
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.Signature(bare)))


def unsaid(before: list[str], after: list[str], changelog: str) -> list[str]:
    """Words that the section "Unreleased" of a changelog lacks: what changed in the listing.

    Of a name that is new or gone the name itself; of a changed signature the parameters that are new or gone, or the
    name where only defaults or the order changed.
    """
    section = changelog.partition("## Unreleased")[2].partition("\n## ")[0]
    old, new = (dict(re.match(r"([\w.]+)(.*)", line).groups() for line in lines) for lines in (before, after))
    words = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        short = name.rpartition(".")[2]
        parameters = [
            set(re.findall(r"(?<=[(* ])\w+(?=[=,)])", signatures.get(name, ""))) for signatures in (old, new)
        ]
        changed = parameters[0] ^ parameters[1] if name in old and name in new else set()
        words += sorted(changed) or [short]
    return [word for word in dict.fromkeys(words) if not re.search(rf"\b{re.escape(word)}\b", section)]


if __name__ == "__main__":
    LISTING.write_text("\n".join(listing()) + "\n", encoding="utf-8")
