"""Look-ahead: which entries of a tile to recompute. Pure functions of tiles, one idea a file."""

from torchlamp.rules.block_running import BlockRunning
from torchlamp.rules.block_view import BlockView
from torchlamp.rules.bridge import Bridge
from torchlamp.rules.budget import Budget, RunningBudget
from torchlamp.rules.condition import Condition, ConditionCheap, Output, OutputCheap
from torchlamp.rules.element_tile import ElementTile
from torchlamp.rules.first_layers import FirstLayers
from torchlamp.rules.heads import Heads
from torchlamp.rules.lamp_attention import LampAttention
from torchlamp.rules.mass import Mass
from torchlamp.rules.mass_window import MassWindow
from torchlamp.rules.none_all import Everything, Nothing
from torchlamp.rules.online_tile import OnlineTile
from torchlamp.rules.oracle import Oracle, OracleResidual
from torchlamp.rules.random import Random, RandomLike
from torchlamp.rules.registry import RULES, register, rule_class, rule_names
from torchlamp.rules.relaxed import REFERENCE_LENGTH, Relaxed, RelaxedLength
from torchlamp.rules.rule import NumberRule, Role, Rule
from torchlamp.rules.running import Running
from torchlamp.rules.sink_recent import SinkRecent
from torchlamp.rules.strict import Strict
from torchlamp.rules.threshold import ThresholdForm, exceeds
from torchlamp.rules.thrift import Thrift
from torchlamp.rules.tile import Tile
from torchlamp.rules.topz import TopZ
from torchlamp.rules.upper_running import UpperRunning
from torchlamp.rules.value_aware import BridgeResidual, RunningOutput, RunningResidual
from torchlamp.rules.weighted import WeightRule

# A new rule is a line here, at its place in lists of rules.
RULES.update(
    (rule.name, rule)
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
        UpperRunning,
        RunningBudget,
        RunningOutput,
        RunningResidual,
        Bridge,
        BridgeResidual,
        TopZ,
        LampAttention,
        SinkRecent,
        Heads,
        FirstLayers,
        Thrift,
        BlockRunning,
        Random,
        RandomLike,
        Condition,
        ConditionCheap,
        Output,
        OutputCheap,
        Oracle,
        OracleResidual,
    )
)

__all__ = [
    "REFERENCE_LENGTH",
    "RULES",
    "BlockRunning",
    "BlockView",
    "Bridge",
    "BridgeResidual",
    "Budget",
    "Condition",
    "ConditionCheap",
    "ElementTile",
    "Everything",
    "FirstLayers",
    "Heads",
    "LampAttention",
    "Mass",
    "MassWindow",
    "Nothing",
    "NumberRule",
    "OnlineTile",
    "Oracle",
    "OracleResidual",
    "Output",
    "OutputCheap",
    "Random",
    "RandomLike",
    "Relaxed",
    "RelaxedLength",
    "Role",
    "Rule",
    "Running",
    "RunningBudget",
    "RunningOutput",
    "RunningResidual",
    "SinkRecent",
    "Strict",
    "ThresholdForm",
    "Thrift",
    "Tile",
    "TopZ",
    "UpperRunning",
    "WeightRule",
    "exceeds",
    "register",
    "rule_class",
    "rule_names",
]
