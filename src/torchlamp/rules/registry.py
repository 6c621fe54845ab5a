"""Every rule by its name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchlamp.rules.rule import Rule

#: Every rule by its name, in the order in which they are listed to the user; the package's `__init__` fills it.
RULES: dict[str, type[Rule]] = {}


def rule_names() -> tuple[str, ...]:
    """Names that `Rule.parse` understands."""
    return tuple(RULES)


def rule_class(name: str) -> type[Rule]:
    """The class of a rule's name.

    Raises
    ------
    ValueError
        If there is no such rule; the message lists the names and suggests the nearest.
    """
    if name in RULES:
        return RULES[name]
    near = difflib.get_close_matches(name.strip().lower(), RULES, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ValueError(f"unknown rule '{name}': {hint}the rules are {', '.join(RULES)}")


def register(rule: type[Rule]) -> type[Rule]:
    """Add a rule of your own, so that every spelling understands it; usable as a class decorator.

    Raises
    ------
    ValueError
        If the name is taken by another class or could not be read back from a spelling.
    """
    name = rule.name
    if not name or any(character in ":=+," or character.isspace() for character in name):
        raise ValueError(f"rule name '{name}': must be a word without ':', '=', '+', ',' and spaces")
    if RULES.get(name, rule) is not rule:
        raise ValueError(f"rule name '{name}' is taken by {RULES[name].__qualname__}; choose another")
    RULES[name] = rule
    return rule
