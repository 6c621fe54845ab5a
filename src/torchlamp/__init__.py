"""Look-ahead mixed precision (LAMP) for transformer inference in PyTorch.

Names are imported when first used, so that ``import torchlamp`` is quick and doesn't load transformers.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchlamp.arithmetic.accumulators import Accumulator
    from torchlamp.arithmetic.formats import Format
    from torchlamp.arithmetic.matmul import matmul
    from torchlamp.arithmetic.operands import Operand
    from torchlamp.arithmetic.quantise import quantise
    from torchlamp.arithmetic.rounding import round_to
    from torchlamp.evaluation.evaluate import evaluate
    from torchlamp.huggingface.calibrate import calibrate
    from torchlamp.huggingface.fold import fold
    from torchlamp.huggingface.lookahead import attach, detach, lookahead
    from torchlamp.huggingface.lookahead_cache import LookaheadCache
    from torchlamp.huggingface.prepare import prepare, prepared
    from torchlamp.models.load import load
    from torchlamp.policy.policy import Policy
    from torchlamp.results.result import Result
    from torchlamp.rules.rule import Rule
    from torchlamp.simulation.calibration import Calibration
    from torchlamp.simulation.compose import compose
    from torchlamp.simulation.statistics import Statistics

try:
    __version__ = version("torchlamp")
except PackageNotFoundError:  # run from a source tree that isn't installed
    __version__ = "0+unknown"

_HOMES = {
    "Accumulator": "arithmetic.accumulators",
    "Calibration": "simulation.calibration",
    "Format": "arithmetic.formats",
    "LookaheadCache": "huggingface.lookahead_cache",
    "Operand": "arithmetic.operands",
    "Policy": "policy.policy",
    "Result": "results.result",
    "Rule": "rules.rule",
    "Statistics": "simulation.statistics",
    "attach": "huggingface.lookahead",
    "calibrate": "huggingface.calibrate",
    "compose": "simulation.compose",
    "detach": "huggingface.lookahead",
    "evaluate": "evaluation.evaluate",
    "fold": "huggingface.fold",
    "load": "models.load",
    "lookahead": "huggingface.lookahead",
    "matmul": "arithmetic.matmul",
    "prepare": "huggingface.prepare",
    "prepared": "huggingface.prepare",
    "quantise": "arithmetic.quantise",
    "round_to": "arithmetic.rounding",
}

__all__ = [
    "Accumulator",
    "Calibration",
    "Format",
    "LookaheadCache",
    "Operand",
    "Policy",
    "Result",
    "Rule",
    "Statistics",
    "__version__",
    "attach",
    "calibrate",
    "compose",
    "detach",
    "evaluate",
    "fold",
    "load",
    "lookahead",
    "matmul",
    "prepare",
    "prepared",
    "quantise",
    "round_to",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchlamp' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"torchlamp.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
