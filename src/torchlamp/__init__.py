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
    from torchlamp.arithmetic.rounding import round_to
    from torchlamp.compositions.policy import Policy
    from torchlamp.compositions.statistics import Statistics
    from torchlamp.integrations.huggingface import attach, detach, lookahead
    from torchlamp.integrations.lookahead_cache import LookaheadCache
    from torchlamp.rules.rule import Rule
    from torchlamp.study.evaluate import evaluate
    from torchlamp.study.models import load
    from torchlamp.study.result import Result

try:
    __version__ = version("torchlamp")
except PackageNotFoundError:  # run from a source tree that isn't installed
    __version__ = "0+unknown"

_HOMES = {
    "Accumulator": "arithmetic.accumulators",
    "Format": "arithmetic.formats",
    "LookaheadCache": "integrations.lookahead_cache",
    "Policy": "compositions.policy",
    "Result": "study.result",
    "Rule": "rules.rule",
    "Statistics": "compositions.statistics",
    "attach": "integrations.huggingface",
    "detach": "integrations.huggingface",
    "evaluate": "study.evaluate",
    "load": "study.models",
    "lookahead": "integrations.huggingface",
    "matmul": "arithmetic.matmul",
    "round_to": "arithmetic.rounding",
}

__all__ = [
    "Accumulator",
    "Format",
    "LookaheadCache",
    "Policy",
    "Result",
    "Rule",
    "Statistics",
    "__version__",
    "attach",
    "detach",
    "evaluate",
    "load",
    "lookahead",
    "matmul",
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
