"""What there is to say of a rule in a list of rules, taken from its class and its docstring."""

import inspect
import re
from dataclasses import dataclass

from torchlamp.rules.rule import Rule


@dataclass(frozen=True)
class RuleEntry:
    """A rule for people who look for one."""

    name: str
    #: published, ours, control, oracle or static.
    role: str
    #: What it must see: any tile, a softmax, an attention, an elementwise function, an online softmax.
    looks_through: str
    #: The formula or the sentence that defines it: the first paragraph of the docstring, on one line.
    definition: str
    #: Where it is from.
    source: str
    examples: tuple[str, ...]
    #: Elementary operations per eligible entry that the look-ahead adds.
    operations: float


def rule_entry(rule: type[Rule]) -> RuleEntry:
    """The entry of a rule; a rule without a docstring of its own has an empty definition."""
    text = inspect.cleandoc(rule.__doc__ or "")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    source = next((p.removeprefix("Source:").strip() for p in paragraphs if p.startswith("Source:")), "")
    definition = re.sub(r"^`[^`]+`:\s*", "", paragraphs[0])
    return RuleEntry(
        rule.name, rule.role, rule.looks_through, definition, source, tuple(rule.examples), rule.operations
    )
