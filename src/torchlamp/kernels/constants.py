"""Numbers and orders that the native kernels and their references share.

The definitions here serve the references, which run without the extension. The extension exports its own as
`torchlamp._native.CONSTANTS`; a test holds them equal, name by name.
"""

from enum import IntFlag
from typing import Any

#: What becomes of results beyond the largest finite number, and the weights of threshold rules: in the order of the
#: native enumerations.
OVERFLOWS = ("inf", "nan", "saturate")
RULE_WEIGHTS = ("strict", "relaxed", "running", "topz", "bridge", "running-residual", "bridge-residual")

#: Keys of a block whose recomputation is counted, and the bits of a block's mark.
BLOCK_KEYS = 16
BLOCK_VISIBLE, BLOCK_TOUCHED = 1, 2

#: Rows of a block of a low-bit copy, and columns that share a scale.
ROWS, GROUP = 16, 32
#: The largest code of each number of bits, and that of the 16-bit integers that vectors are rounded to.
LARGEST_CODE = {4: 7, 8: 127, 12: 2047}
LARGEST_SHORT = 32767

#: Activations of a low-bit MLP, in the order of the native enumeration.
ACTIVATIONS = ("silu", "gelu_tanh")

#: If recomputation raises a logit by more than `SURPRISE` above the row's largest low-bit logit, or leaves less than
#: `VANISHED` of the sum of exponentials, decoding does the row again in full precision.
SURPRISE, VANISHED = 8.0, 0.125
#: Low-bit values with a probability of at most `SKIP` / (keys that the query sees) are left out of its sum.
SKIP = 2.0**-8


class AppendFlags(IntFlag):
    """What a key-value store finds in the numbers that are appended to it."""

    #: A finite number is too large for float16.
    OVERFLOW = 1
    #: A value is infinite or NaN.
    NONFINITE_VALUES = 2


def shared() -> dict[str, Any]:
    """Every constant that the extension exports, under its name there."""
    return {
        "overflows": OVERFLOWS,
        "rule_weights": RULE_WEIGHTS,
        "block_keys": BLOCK_KEYS,
        "block_visible": BLOCK_VISIBLE,
        "block_touched": BLOCK_TOUCHED,
        "rows": ROWS,
        "group": GROUP,
        "largest_code": LARGEST_CODE,
        "largest_short": LARGEST_SHORT,
        "activations": ACTIVATIONS,
        "surprise": SURPRISE,
        "vanished": VANISHED,
        "skip": SKIP,
        "append_overflow": int(AppendFlags.OVERFLOW),
        "append_nonfinite_values": int(AppendFlags.NONFINITE_VALUES),
    }
