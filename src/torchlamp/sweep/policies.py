"""The policies of a grid: full spellings, or accumulators x sites x rules, with thresholds or target rates."""

import re
from dataclasses import dataclass

from torchlamp.policy.policy import Policy
from torchlamp.policy.precision import Precision
from torchlamp.rules.registry import rule_class
from torchlamp.rules.rule import NumberRule, Rule
from torchlamp.sweep.points import HOLE
from torchlamp.sweep.yaml_tree import Node

_RULE_WITH_HOLE = re.compile(r"([\w-]+):\{\}")


@dataclass(frozen=True)
class Candidate:
    """A policy of a grid: its spelling, and the rate that the threshold in its `HOLE` must give, if it has one."""

    spelling: str
    target_rate: float | None = None

    @property
    def random(self) -> bool:
        """Whether what it selects depends on a seed."""
        return any(part.needs_generator for part in sample(self.spelling).sites.values())


def candidates(grid: Node, axes: dict[str, Node]) -> list[Candidate]:
    """All policies of a grid, in the order of the file; `axes` are its keys.

    Raises
    ------
    ValueError
        A spelling, threshold or target rate is wrong, or there is nothing to run.
    """
    found: list[Candidate] = []
    if "policies" in axes:
        for node in axes["policies"].items():
            found += _with_parameters(node, "policy", [None])
    if "rules" in axes:
        if "accumulate" not in axes:
            raise axes["rules"].error(
                "rules need accumulators: add for example 'accumulate: [ps4]', or write 'policies' in full"
            )
        for accumulator in axes["accumulate"].items():
            for sites in axes["sites"].items() if "sites" in axes else [None]:
                frame = _frame(accumulator, sites)
                for node in axes["rules"].items():
                    found += _with_parameters(node, "name", frame)
    if not found:
        raise grid.error("there is nothing to run: give rules (with accumulate), or policies")
    return list(dict.fromkeys(found))


def _frame(accumulator: Node, sites: Node | None) -> list[str | None]:
    """The beginning of each site's policy: 'ps4+', or 'mlp_up=ps4+' and 'mlp_down=ps4+'."""
    spelling = accumulator.string("accumulate")
    try:
        spelling = str(Precision.parse(spelling))
    except ValueError as error:
        raise accumulator.error(str(error)) from error
    if sites is None:
        return [f"{spelling}+"]
    names = [name.strip() for name in sites.string("sites").split("&")]
    try:
        Policy.parse(", ".join(f"{name}={spelling}+none" for name in names))
    except ValueError as error:
        raise sites.error(str(error)) from error
    return [f"{name}={spelling}+" for name in names]


def _with_parameters(node: Node, kind: str, frame: list[str | None]) -> list[Candidate]:
    """The policies of one item: a spelling, or a name with a list of thresholds or target rates.

    `kind` is "policy" (the name is a whole policy, its threshold written {}) or "name" (a rule's, to go after
    each part of the frame).
    """
    if not isinstance(node.value, dict):
        spelling = node.string("policy" if kind == "policy" else "rule")
        if HOLE in spelling:
            raise node.error(
                f"{spelling!r} has {HOLE} for its threshold: give thresholds or target_rates beside it"
            )
        return [Candidate(_checked(node, _placed(spelling, frame)))]
    keys = node.mapping((kind, "thresholds", "target_rates"), "a rule" if kind == "name" else "a policy")
    if kind not in keys:
        raise node.error(f"{kind!r} is missing beside {', '.join(keys)}")
    name = keys[kind].string(kind)
    if ("thresholds" in keys) == ("target_rates" in keys):
        raise node.error(f"{name!r}: give either thresholds or target_rates")
    if kind == "policy" and HOLE not in name:
        raise keys[kind].error(f"policy {name!r}: write {HOLE} in the place of its threshold")
    template = name if kind == "policy" else f"{name}:{HOLE}"
    if "thresholds" in keys:
        return [
            Candidate(_checked(item, _placed(template.replace(HOLE, _threshold(item)), frame)))
            for item in keys["thresholds"].items()
        ]
    spelling = _checked_template(keys[kind], _placed(template, frame))
    return [Candidate(spelling, item.number("target rate", 0, 1)) for item in keys["target_rates"].items()]


def _placed(rule: str, frame: list[str | None]) -> str:
    return ", ".join(rule if start is None else start + rule for start in frame)


def _threshold(node: Node) -> str:
    value = node.value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise node.error(f"threshold {node.plain()!r}: a number is expected")
    # A sum of digits such as 1e+20 would read as an accumulator and a rule.
    return str(value).replace("e+", "e")


def _checked(node: Node, spelling: str) -> str:
    """The canonical spelling of a policy."""
    try:
        return str(Policy.parse(spelling))
    except ValueError as error:
        raise node.error(str(error)) from error


def _checked_template(node: Node, spelling: str) -> str:
    """The canonical spelling of a policy with holes, all of which must be the number of some rule."""
    names = _RULE_WITH_HOLE.findall(spelling)
    try:
        rules = [rule_class(name) for name in names]
    except ValueError as error:
        raise node.error(str(error)) from error
    for rule in rules:
        if not issubclass(rule, NumberRule):
            raise node.error(
                f"rule {rule.name!r} has no single number that could be found from a target rate: list its "
                "spellings instead"
            )
    if not rules or len(names) != spelling.count(HOLE):
        raise node.error(
            f"{spelling!r}: {HOLE} must follow a rule's name and a colon, as in 'ps4+strict:{HOLE}'"
        )
    probe = _probe(spelling)
    return _checked(node, spelling.replace(HOLE, probe)).replace(probe, HOLE)


def _probe(template: str) -> str:
    """An allowed number, with digits that no threshold of a sweep has."""
    low, high = threshold_range(template)
    return repr(low + 0.73645981 * (min(high, low + 1) - low))


def sample(template: str) -> Policy:
    """The policy of a spelling, with some allowed number in its holes."""
    return Policy.parse(template.replace(HOLE, _probe(template)) if HOLE in template else template)


def threshold_range(template: str) -> tuple[float, float]:
    """Smallest and largest number that all rules with a hole allow."""
    rules = [rule_class(name) for name in _RULE_WITH_HOLE.findall(template)]
    ranges = [rule.allowed for rule in rules if issubclass(rule, NumberRule)]
    return max(low for low, _ in ranges), min(high for _, high in ranges)


def typical_threshold(template: str) -> float:
    """A number in the usual range of the first rule with a hole: where to start looking."""
    rule = Rule.parse(rule_class(_RULE_WITH_HOLE.findall(template)[0]).examples[0])
    return rule.value if isinstance(rule, NumberRule) else 0.1
