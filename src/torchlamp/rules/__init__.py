"""Look-ahead: which entries of a tile to recompute. Pure functions of tiles, one idea a file."""

from torchlamp.rules.condition import Condition, ConditionCheap, Output, OutputCheap
from torchlamp.rules.element_tile import ElementTile
from torchlamp.rules.mass import Mass
from torchlamp.rules.none_all import Everything, Nothing
from torchlamp.rules.random import Random, RandomLike
from torchlamp.rules.registry import RULES, register, rule_class, rule_names
from torchlamp.rules.relaxed import REFERENCE_LENGTH, Relaxed, RelaxedLength
from torchlamp.rules.rule import NumberRule, Rule
from torchlamp.rules.running import Running
from torchlamp.rules.strict import Strict
from torchlamp.rules.threshold import ThresholdForm, exceeds
from torchlamp.rules.tile import Tile
from torchlamp.rules.topz import TopZ

__all__ = [
    "REFERENCE_LENGTH",
    "RULES",
    "Condition",
    "ConditionCheap",
    "ElementTile",
    "Everything",
    "Mass",
    "Nothing",
    "NumberRule",
    "Output",
    "OutputCheap",
    "Random",
    "RandomLike",
    "Relaxed",
    "RelaxedLength",
    "Rule",
    "Running",
    "Strict",
    "ThresholdForm",
    "Tile",
    "TopZ",
    "exceeds",
    "register",
    "rule_class",
    "rule_names",
]
