"""Look-ahead: which entries of a tile to recompute. Pure functions of tiles, one idea a file."""

from torchlamp.rules.none_all import Everything, Nothing
from torchlamp.rules.registry import RULES, register, rule_class, rule_names
from torchlamp.rules.rule import NumberRule, Rule
from torchlamp.rules.strict import Strict
from torchlamp.rules.threshold import ThresholdForm, exceeds
from torchlamp.rules.tile import Tile

__all__ = [
    "RULES",
    "Everything",
    "Nothing",
    "NumberRule",
    "Rule",
    "Strict",
    "ThresholdForm",
    "Tile",
    "exceeds",
    "register",
    "rule_class",
    "rule_names",
]
