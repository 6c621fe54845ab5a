"""Every rule by its name."""

from __future__ import annotations

import difflib

from torchlamp.rules.bridge import Bridge
from torchlamp.rules.budget import Budget, RunningBudget
from torchlamp.rules.condition import Condition, ConditionCheap, Output, OutputCheap
from torchlamp.rules.heads import Heads
from torchlamp.rules.mass import Mass
from torchlamp.rules.mass_window import MassWindow
from torchlamp.rules.none_all import Everything, Nothing
from torchlamp.rules.oracle import Oracle, OracleResidual
from torchlamp.rules.random import Random, RandomLike
from torchlamp.rules.relaxed import Relaxed, RelaxedLength
from torchlamp.rules.rule import Rule
from torchlamp.rules.running import Running
from torchlamp.rules.sink_recent import SinkRecent
from torchlamp.rules.strict import Strict
from torchlamp.rules.topz import TopZ
from torchlamp.rules.value_aware import BridgeResidual, RunningOutput, RunningResidual

#: The rules of the package, in the order in which they are listed to the user.
RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Nothing,
        Everything,
        Strict,
        Relaxed,
        RelaxedLength,
        Mass,
        MassWindow,
        Budget,
        Running,
        RunningBudget,
        RunningOutput,
        RunningResidual,
        Bridge,
        BridgeResidual,
        TopZ,
        SinkRecent,
        Heads,
        Random,
        RandomLike,
        Condition,
        ConditionCheap,
        Output,
        OutputCheap,
        Oracle,
        OracleResidual,
    )
}


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
