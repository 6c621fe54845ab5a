"""Colours, markers and lines of everything that a report draws, the same on paper and on the page.

Python draws the files of a report with matplotlib, and the page's script draws with plotly: both take their styles from
here, the script as JSON. The first eight colours are those of Okabe and Ito (2008), which people with any common colour
blindness can tell apart; shape and dash say the same again. The dark variants are lightened to a contrast of 4.5:1 or
more.
"""

import colorsys
from dataclasses import asdict, dataclass, replace
from typing import Any

from torchlamp.rules import RULES, Role


@dataclass(frozen=True)
class Style:
    """Colours on light and on dark paper, marker and line."""

    light: str
    dark: str
    #: matplotlib's marker and plotly's symbol of the same shape.
    marker: str = "o"
    symbol: str = "circle"
    #: matplotlib's line style and plotly's dash.
    line: Any = "-"
    dash: str = "solid"

    def to_dict(self) -> dict[str, Any]:
        """For the page's script."""
        return asdict(self)


#: Name of a rule (the first word of its label) -> its style.
STYLES: dict[str, Style] = {
    "strict": Style("#0072b2", "#56a8e0"),
    "running": Style("#d55e00", "#f0883e", "s", "square"),
    "running-residual": Style("#c23b4e", "#f08a94", "X", "x"),
    "running-output": Style("#009e73", "#3cc79a", "D", "diamond"),
    "bridge": Style("#6a6f2a", "#b9bf62", "H", "hexagon2"),
    "bridge-residual": Style("#2b7f86", "#6cc5cc", "8", "octagon"),
    "budget": Style("#b0508f", "#df9cc4", "^", "triangle-up"),
    "running-budget": Style("#b0508f", "#df9cc4", "2", "y-up-open"),
    "relaxed": Style("#3a95c9", "#8fcdf0", "v", "triangle-down"),
    "relaxed-length": Style("#5e7fb8", "#a3b8e6", "<", "triangle-left"),
    "mass": Style("#b07d00", "#e6b422", ">", "triangle-right"),
    "mass-window": Style("#b07d00", "#e6b422", "4", "y-right-open"),
    "topz": Style("#8a6d1f", "#c9b458", "p", "pentagon"),
    "condition": Style("#2e7d4f", "#7fce9c", "d", "diamond-tall-open"),
    "sink-recent": Style("#7a4f9a", "#b898dd", "h", "hexagon"),
    "heads": Style("#8f4a2e", "#d79a7d", "1", "y-down-open"),
    "random": Style("#767676", "#9a9a9a", "x", "x-thin-open", "--", "dash"),
    "random-like": Style("#767676", "#9a9a9a", "+", "cross-thin-open", "--", "dash"),
    "oracle": Style("#222222", "#e8e8e8", "*", "star-open", ":", "dot"),
    "oracle-residual": Style("#222222", "#e8e8e8", "P", "cross-open", ":", "dot"),
    "none": Style("#767676", "#9a9a9a", "d", "diamond-tall", "-", "solid"),
    "all": Style("#444444", "#c0c0c0", "P", "cross"),
}

#: The published rule, which others are measured against.
BASE = "strict"

#: Rules that came later take these, in the order in which they are met.
_MORE = (
    Style("#4d5dc4", "#9aa5f2", "3", "y-left-open"),
    Style("#b3661f", "#eba35c", "o", "circle-open"),
    Style("#3f7d3a", "#8ccf85", "s", "square-open"),
    Style("#8a5a83", "#cfa3c9", "D", "diamond-open"),
    Style("#5f6f7a", "#aebfca", "^", "triangle-up-open"),
)


def styles(labels: list[str]) -> dict[str, Style]:
    """A style for every label, the same whenever the labels are the same."""
    found: dict[str, Style] = {}
    unknown = sorted({_name(label) for label in labels} - set(STYLES))
    extra = {name: _more(i) for i, name in enumerate(unknown)}
    for label in labels:
        name = _name(label)
        found[label] = STYLES[name] if name in STYLES else extra[name]
        followed = STYLES.get(label.removeprefix(f"{name} "))
        if rule_role(label) == "control" and followed is not None and followed is not STYLES[BASE]:
            # The control of another rule than the published one has that rule's marker.
            found[label] = replace(found[label], marker=followed.marker, symbol=followed.symbol)
    return found


def _more(number: int) -> Style:
    """The style of the unknown rule with this number: after the last of `_MORE` the next line, then other markers."""
    turn, own = divmod(number, len(_MORE))
    turn, line_number = divmod(turn, len(_OTHER_LINES))
    line, dash = _OTHER_LINES[line_number]
    found = replace(_MORE[own], line=line, dash=dash)
    if turn:
        others = [pair for pair in _MARKERS if pair[0] not in {style.marker for style in _MORE}]
        marker, symbol = others[(turn - 1) % len(others)]
        found = replace(found, marker=marker, symbol=symbol)
    return found


def _name(label: str) -> str:
    """The rule that a label begins with; several rules together are one of their own."""
    return label if " / " in label else label.split(" ")[0]


def rule_role(label: str) -> Role | None:
    """The role of the rule whose name a label starts with; None for what isn't a rule of this installation."""
    kind = RULES.get(_name(label))
    return None if kind is None else kind.role


def order(label: str) -> tuple[int, int, str]:
    """Rules in the order of `STYLES`, those that came later before the controls."""
    names = list(STYLES)
    name = _name(label)
    last = rule_role(label) in ("control", "oracle")
    return (int(last), names.index(name) if name in names else len(names), label)


def legend_label(label: str) -> str:
    """A rule's label in a legend."""
    words = {"none": "none (uniform precision)", "all": "all recomputed"}.get(label, label)
    return f"{words} (not realisable)" if rule_role(label) == "oracle" else words


#: Lines that tell policies of one rule apart, in their order.
_LINES: tuple[tuple[Any, str], ...] = (
    ("-", "solid"), ("--", "dash"), (":", "dot"), ("-.", "dashdot"), ((0, (8, 3)), "longdash"),
)  # fmt: skip
#: Lines that neither a control nor an oracle has.
_OTHER_LINES: tuple[tuple[Any, str], ...] = (
    ("-", "solid"), ((0, (8, 3)), "longdash"), ("-.", "dashdot"), ((0, (8, 2, 1, 2)), "longdashdot"),
)  # fmt: skip
#: Markers that tell accumulators apart, in their order.
_MARKERS = (
    ("o", "circle"), ("s", "square"), ("D", "diamond"), ("^", "triangle-up"), ("X", "x"), ("*", "star"),
    ("p", "pentagon"), ("h", "hexagon"),
)  # fmt: skip


def numbered(style: Style, number: int) -> Style:
    """The style of a rule's policy with this number, where several policies of the rule are drawn: another line."""
    line, dash = _LINES[number % len(_LINES)]
    marker, symbol = _MARKERS[number // len(_LINES) % len(_MARKERS)]
    return Style(style.light, style.dark, marker, symbol, line, dash)


def accumulator_styles(names: list[str]) -> dict[str, Style]:
    """A style for each accumulator, narrow ones in the strongest shade of blue."""
    found = {}
    for index, name in enumerate(names):
        part = index / max(1, len(names) - 1)
        marker, symbol = _MARKERS[index % len(_MARKERS)]
        light, dark = _blue(0.80, 0.22 + 0.43 * part), _blue(0.65, 0.80 - 0.45 * part)
        found[name] = Style(light, dark, marker, symbol)
    return found


def _blue(saturation: float, lightness: float) -> str:
    channels = colorsys.hls_to_rgb(205 / 360, lightness, saturation)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
