"""Number systems: formats, rounding, accumulators, and matrix products that round at every step.

Nothing here knows of models or attention.
"""

from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.formats import Format
from torchlamp.arithmetic.matmul import matmul
from torchlamp.arithmetic.rounding import round_to

__all__ = ["Accumulator", "Format", "matmul", "round_to"]
