"""mmasim: models of matrix units that are bit-accurate against hardware."""

import importlib
import sys
import types

# The FMA of mmasim's float64 units, which would be compiled when it is imported; no unit here has it.
sys.modules.setdefault("mmasim.arithmetic.fma", types.ModuleType("fma"))
nv_ptx = importlib.import_module("mmasim.nv_ptx")
