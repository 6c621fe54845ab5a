"""The configuration of a sweep: a YAML file, checked as a whole before anything is computed (docs/sweep.md)."""

import difflib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlamp.data.datasets import check_text
from torchlamp.models.load import check_name, context_length, layer_count
from torchlamp.sweep.points import REAL, SHUFFLED, Calibration, Point, digest, in_order
from torchlamp.sweep.policies import candidates
from torchlamp.sweep.yaml_tree import Node, read_yaml

#: Keys of a grid, which may also stand at the top as defaults of all grids.
GRID_KEYS = (
    "models", "texts", "tokens", "windows", "window_length", "accumulate", "sites", "rules", "policies", "layers",
    "seeds", "calibration",
)  # fmt: skip
TOP_KEYS = (*GRID_KEYS, "grids", "threads", "reference_memory_gb")
#: Values of the keys that neither a grid nor the top names.
_DEFAULTS: dict[str, Any] = {
    "texts": ["prose"], "tokens": [REAL], "windows": [8], "window_length": [512], "layers": [None], "seeds": [0],
}  # fmt: skip
#: Windows and tolerance of a calibration that doesn't name them.
_CALIBRATION_WINDOWS, _TOLERANCE = 1, 0.02


@dataclass(frozen=True)
class SweepGrid:
    """A named part of a sweep, with its points in the order of its axes."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class SweepConfig:
    """A checked configuration of a sweep."""

    grids: tuple[SweepGrid, ...]
    #: Torch threads of each process that computes; None: torch's choice (1 under Ray).
    threads: int | None
    #: Memory for reference logits in bytes, of each process that computes; None: half of what is free.
    reference_memory: int | None
    #: The file's content.
    configuration: dict[str, Any]

    @property
    def points(self) -> list[Point]:
        """Every point once, in the order in which they are computed."""
        return in_order(point for grid in self.grids for point in grid.points)

    def to_dict(self) -> dict[str, Any]:
        """The configuration, its digest, and the keys of each grid's points: the content of sweep.json."""
        return {
            "configuration": self.configuration,
            "configuration_sha256": digest(self.configuration),
            "grids": [{"name": g.name, "points": [p.key for p in g.points]} for g in self.grids],
        }


def read_config(path: Path) -> SweepConfig:
    """Read and check a configuration; no model is loaded, unless ``layers: each`` needs one that was never converted.

    Raises
    ------
    OSError
        The file, or a text or model that it names, can't be read.
    ValueError
        Something in it is wrong: the message holds the line and what is allowed.
    """
    root = read_yaml(path)
    top = root.mapping(TOP_KEYS, "the configuration")
    threads = top["threads"].integer("threads", 1) if "threads" in top else None
    memory = (
        top["reference_memory_gb"].number("reference_memory_gb", -1e-9, 1e6)
        if "reference_memory_gb" in top
        else None
    )
    parts = top["grids"].items() if "grids" in top else [root]
    shared = {key: node for key, node in top.items() if key in GRID_KEYS}
    grids: list[SweepGrid] = []
    for number, part in enumerate(parts, start=1):
        own = part.mapping(("name", *GRID_KEYS), "a grid") if part is not root else {}
        name = own["name"].string("name") if "name" in own else f"grid {number}"
        if any(grid.name == name for grid in grids):
            raise own["name"].error(f"two grids are called {name!r}: give each its own name")
        # A grid's own policies replace what the top would have made of rules, and the other way round.
        if "policies" in own or "rules" in own:
            inherited = {k: v for k, v in shared.items() if k not in ("policies", "rules")}
        else:
            inherited = shared
        grids.append(SweepGrid(name, tuple(_points(part, inherited | own))))
    return SweepConfig(tuple(grids), threads, None if memory is None else int(memory * 1e9), root.plain())


def _points(grid: Node, axes: dict[str, Node]) -> list[Point]:
    """The points of a grid, its last axis changing fastest."""
    if "models" not in axes:
        raise grid.error("models are missing: name at least one, for example 'models: [smollm2-135m]'")
    models = _axis(axes, "models", _model)
    texts = _axis(axes, "texts", _text)
    tokens = _axis(axes, "tokens", _tokens)
    windows = _axis(axes, "windows", lambda node: node.integer("windows", 1))
    lengths = _axis(axes, "window_length", lambda node: _length(node, models))
    seeds = _axis(axes, "seeds", lambda node: node.integer("seed", 0))
    layer_sets = {model: _layers(axes.get("layers"), model) for model in models}
    policies = candidates(grid, axes)
    found: list[Point] = []
    chosen = itertools.product(models, texts, tokens, windows, lengths, policies)
    for model, text, order, count, length, policy in chosen:
        calibration = _calibration(axes.get("calibration"), text, count) if policy.target_rate else None
        for layers, seed in itertools.product(layer_sets[model], seeds):
            # Other seeds would repeat a result that doesn't depend on them.
            if seed == seeds[0] or order == SHUFFLED or policy.random:
                point = Point(
                    model,
                    text,
                    order,
                    count,
                    length,
                    policy.spelling,
                    layers,
                    seed,
                    policy.target_rate,
                    calibration,
                )
                found.append(point)
    return list(dict.fromkeys(found))


def _axis(axes: dict[str, Node], name: str, read: Callable[[Node], Any]) -> list[Any]:
    if name not in axes:
        return list(_DEFAULTS[name])
    return list(dict.fromkeys(read(node) for node in axes[name].items()))


def _model(node: Node) -> str:
    name = node.string("model")
    try:
        check_name(name)
    except (OSError, ValueError) as error:
        raise node.error(str(error)) from error
    return name


def _length(node: Node, models: list[str]) -> int:
    """The length of a window, which must fit the contexts of all models that are here."""
    length = node.integer("window_length", 2)
    for model in models:
        context = context_length(model)
        if context is not None and length > context:
            raise node.error(
                f"window_length {length} is longer than the context of {model}: give at most {context}"
            )
    return length


def _text(node: Node) -> str:
    name = node.string("text")
    try:
        check_text(name)
    except (OSError, ValueError) as error:
        raise node.error(str(error)) from error
    return name


def _tokens(node: Node) -> str:
    allowed = (REAL, SHUFFLED)
    if node.value not in allowed:
        near = difflib.get_close_matches(str(node.value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise node.error(f"tokens is {node.plain()!r}: allowed are {' and '.join(allowed)}{hint}")
    return str(node.value)


def _layers(axis: Node | None, model: str) -> list[tuple[int, ...] | None]:
    """The sets of layers to run; None is all of them."""
    if axis is None:
        return [None]
    found: list[tuple[int, ...] | None] = []
    for node in axis.items():
        if node.value is None:
            found.append(None)
            continue
        count = layer_count(model)
        if node.value == "each":
            found += [(layer,) for layer in range(count)]
            continue
        chosen = [item.value for item in node.items()]
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < count for n in chosen):
            raise node.error(
                f"layers has {node.plain()!r}: give null (all), each, or numbers from 0 to {count - 1}, "
                f"the last layer of {model}"
            )
        found.append(tuple(sorted(set(chosen))))
    return list(dict.fromkeys(found))


def _calibration(node: Node | None, text: str, windows: int) -> Calibration:
    """By default the window after the evaluated ones of the same text."""
    keys = node.mapping(("text", "windows", "tolerance"), "calibration") if node is not None else {}
    name = _text(keys["text"]) if "text" in keys else text
    count = keys["windows"].integer("windows", 1) if "windows" in keys else _CALIBRATION_WINDOWS
    tolerance = keys["tolerance"].number("tolerance", 0, 1) if "tolerance" in keys else _TOLERANCE
    return Calibration(name, windows if name == text else 0, count, tolerance)
