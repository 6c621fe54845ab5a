"""A gated MLP from low-bit copies of its three matrices, look-ahead through the activation and the down projection.

`native/lowbit/mlp.hpp` is the kernel, `LowBitMlp.reference` its readable equal; docs/decoding.md derives the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchlamp.kernels.constants import ACTIVATIONS, ROWS
from torchlamp.kernels.dispatch import NativeKernels, NativeObject, as_native, native_for
from torchlamp.kernels.full_rows import FULL, linear, slabs
from torchlamp.kernels.low_bit_matrix import LowBitMatrix, check_kept, check_vectors
from torchlamp.kernels.reference_lowbit import block_count

_MATRICES = ("gate", "up", "down")
_LARGEST = torch.finfo(torch.float32).max
#: What float16 loses of a normal number, relative to it.
_HALF_UNIT = 2.0**-11


@dataclass(eq=False)
class LowBitMlp:
    """down(phi(gate x) * up x) with low-bit copies; neuron j owns row j of gate and up, and column j of down.

    Made by `pack`. The full-precision rows of gate and up are the given weights themselves; the columns of the down
    projection are a float16 copy, transposed so that each is contiguous; where float16 can't hold them, float32.
    """

    gate: LowBitMatrix
    up: LowBitMatrix
    down: LowBitMatrix
    #: (neurons, columns), (neurons, columns), (neurons, outputs): float32, bfloat16 or float16.
    gate_full: Tensor
    up_full: Tensor
    #: None: no column is ever read in full.
    down_full: Tensor | None
    #: Norms of the columns of the down projection and of what their low-bit copies leave out; zeros behind.
    norms: Tensor
    errors: Tensor
    activation: str
    _native: NativeObject = field(default_factory=NativeObject, init=False, repr=False, compare=False)

    @classmethod
    @torch.no_grad()
    def pack(
        cls,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        activation: str,
        up_bits: int = 8,
        down_bits: int = 8,
        full: torch.dtype | None = torch.float16,
    ) -> "LowBitMlp":
        """Make the copies.

        Parameters
        ----------
        gate, up : Tensor
            float32, bfloat16 or float16 (neurons, columns) on the CPU; kept, not copied.
        down : Tensor
            The same (outputs, neurons).
        activation : str
            One of `ACTIVATIONS`.
        up_bits, down_bits : int
            Bits of gate and up, and of down: 4, 8 or 12.
        full : torch.dtype, optional
            Of the transposed copy of a float32 down projection: float16, or float32, which is exact. That of a
            bfloat16 or float16 one has its own dtype, which is exact, too. None makes no such copy: the MLP then runs
            under infinite thresholds only.

        Raises
        ------
        ValueError
            Another activation, other bits, or sizes that don't fit together.
        TypeError
            Weights of other dtypes.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: the kernel knows {' and '.join(ACTIVATIONS)}")
        if (
            {w.ndim for w in (gate, up, down)} != {2}
            or gate.shape != up.shape
            or gate.shape[0] != down.shape[1]
        ):
            shapes = ", ".join(str(tuple(w.shape)) for w in (gate, up, down))
            raise ValueError(
                f"gate, up and down of shapes {shapes} are no gated MLP: give (n, k), (n, k), (m, n)"
            )
        copy = LowBitMatrix.pack(down.detach(), down_bits)
        neurons = len(gate)
        norms, errors = torch.zeros(2, block_count(neurons) * ROWS)
        norms[:neurons] = _norms(down.detach().T)
        errors[:neurons] = _column_errors(down.detach(), copy)
        return cls(
            LowBitMatrix.pack(gate.detach(), up_bits),
            LowBitMatrix.pack(up.detach(), up_bits),
            copy,
            as_native(gate),
            as_native(up),
            None if full is None else _transposed(down.detach(), norms[:neurons], full),
            norms,
            errors,
            activation,
        )

    @classmethod
    def of(
        cls,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        tensors: Mapping[str, Tensor],
        activation: str,
        up_bits: int,
        down_bits: int,
    ) -> "LowBitMlp":
        """The MLP of these weights over tensors that `tensors` once gave; the weights aren't read.

        Raises
        ------
        ValueError
            Tensors of other sizes or dtypes than those of such an MLP.
        """
        neurons, padded = len(gate), block_count(len(gate)) * ROWS
        for name in ("norms", "column_errors"):
            check_kept(tensors, name, (padded,), torch.float32)
        full = tensors.get("down_full")
        if full is not None and (full.shape != down.T.shape or full.dtype not in FULL):
            raise ValueError(f"a kept down projection has the shape {tuple(full.shape)} and {full.dtype}")
        parts = {
            name: {
                key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")
            }
            for name in _MATRICES
        }
        return cls(
            LowBitMatrix.of(parts["gate"], up_bits, neurons, gate.shape[1]),
            LowBitMatrix.of(parts["up"], up_bits, neurons, up.shape[1]),
            LowBitMatrix.of(parts["down"], down_bits, len(down), neurons),
            as_native(gate),
            as_native(up),
            full,
            tensors["norms"],
            tensors["column_errors"],
            activation,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that was computed of the weights, for `of`."""
        copies = dict(zip(_MATRICES, (self.gate, self.up, self.down), strict=True))
        found = {f"{name}.{key}": t for name, copy in copies.items() for key, t in copy.tensors().items()}
        found |= {"norms": self.norms, "column_errors": self.errors}
        return found if self.down_full is None else {**found, "down_full": self.down_full}

    @torch.no_grad()
    def run(self, x: Tensor, up_threshold: float, down_threshold: float) -> tuple[Tensor, int, int]:
        """The MLP of a few vectors.

        Parameters
        ----------
        x : Tensor
            float32 (vectors, columns).
        up_threshold, down_threshold : float
            What the weights are compared with: below 0 everything is recomputed, at infinity nothing.

        Returns
        -------
        tuple
            float32 (vectors, outputs); neurons recomputed; columns of the down projection read in full precision.

        Raises
        ------
        ValueError
            Vectors of another shape or device, or a finite threshold where no columns are there to be read in full.
        TypeError
            Vectors that aren't float32.
        """
        x = check_vectors(x, self.gate.columns)
        if self.down_full is None and not up_threshold == down_threshold == float("inf"):
            raise ValueError(
                f"thresholds {up_threshold} and {down_threshold}: the MLP was made without columns to read in full, "
                "which only infinite ones don't ask for; pack it with full=torch.float16"
            )
        native = native_for(x)
        if native is None:
            return self.reference(x, up_threshold, down_threshold)
        y = x.new_empty(len(x), self.down.rows)
        selected = self.kernel(native).run(x, y, up_threshold, down_threshold, torch.get_num_threads())
        return y, *selected

    def reference(self, x: Tensor, up_threshold: float, down_threshold: float) -> tuple[Tensor, int, int]:
        """`run` in torch, on the same copies."""
        neurons, columns = self.gate_full.shape
        a, b = self.gate.products(x), self.up.products(x)
        value, slope = activate(self.activation, a)
        norms, errors = self.norms[:neurons], self.errors[:neurons]
        spread = x.norm(dim=1, keepdim=True) / columns**0.5
        weight = norms * spread * torch.hypot(slope * b * self.gate.errors, value * self.up.errors)
        size = (value * b * norms).norm(dim=1, keepdim=True)
        # Written so that a NaN is recomputed; where the sum overflows nothing is known of any neuron.
        size = torch.where(size.isfinite(), size, torch.nan)
        again = ~(weight <= _limit(up_threshold, size)) & (self.down_full is not None)
        a = torch.where(again, linear(x, self.gate_full), a)
        b = torch.where(again, linear(x, self.up_full), b)
        h = activate(self.activation, a)[0] * b
        if self.down_full is None:
            return self.down.products(h), 0, 0
        full = ~(h.abs() * errors <= _limit(down_threshold, size))
        y = torch.where(full, h, 0) @ self.down_full.float() + self.down.products(torch.where(full, 0, h))
        return y, int(again.sum()), int(full.sum())

    @property
    def bytes(self) -> tuple[int, int]:
        """Memory of the low-bit copies, and of the full-precision copy of the down projection."""
        return self.gate.bytes + self.up.bytes + self.down.bytes, (
            0 if self.down_full is None else self.down_full.nbytes
        )

    def kernel(self, native: NativeKernels) -> Any:
        """The native object over the copies."""
        return self._native.get(native, self._make)

    def _make(self, native: NativeKernels) -> Any:
        columns = self.down_full
        if columns is None:  # a row of zeros in the place of all: nothing reads them
            columns = torch.zeros(1, self.down.rows).expand(self.down.columns, -1)
        return native.extension.Mlp(
            native.instruction_set,
            *(matrix.kernel(native) for matrix in (self.gate, self.up, self.down)),
            self.gate_full,
            self.up_full,
            columns,
            self.norms,
            self.errors,
            ACTIVATIONS.index(self.activation),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": NativeObject()}


def activate(name: str, a: Tensor) -> tuple[Tensor, Tensor]:
    """phi(a) and phi'(a), float32 of the shape of `a`."""
    if name == "silu":
        s = torch.sigmoid(a)
        return functional.silu(a), s * (1 + a * (1 - s))
    root, cube = (2 / torch.pi) ** 0.5, 0.044715
    # (1 + tanh u) / 2 is the sigmoid of 2 u, in which nothing cancels for negative u.
    s = torch.sigmoid(2 * root * (a + cube * a**3))
    return a * s, s * (1 + 2 * root * a * (1 - s) * (1 + 3 * cube * a**2))


def _column_errors(weight: Tensor, copy: LowBitMatrix) -> Tensor:
    """2-norms of the columns of a matrix (rows, columns) less its copy: float32 (columns,)."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64)
    for first, rows in slabs(weight, ROWS):
        squares += (rows - copy.part(first, len(rows)).dequantised()).double().square().sum(0)
    return squares.sqrt().float()


def _transposed(down: Tensor, norms: Tensor, full: torch.dtype) -> Tensor:
    """The columns of a matrix as contiguous rows; a bfloat16 or float16 matrix is its own full-precision copy."""
    if down.dtype == torch.float32 and full != torch.float32:
        read = down.T.to(full).contiguous()
        if (_norms(down.T - read.float()) <= _HALF_UNIT * norms).all():
            return read
    return down.T.contiguous()


def _norms(rows: Tensor) -> Tensor:
    """2-norms of rows, float32, whose squares float32 may not hold."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.float()


def _limit(threshold: float, size: Tensor) -> Tensor:
    """What weights are compared with; those that aren't finite exceed every limit, and all exceed NaN."""
    if threshold < 0:
        return torch.full_like(size, -1.0)
    return torch.full_like(size, _LARGEST) if threshold > _LARGEST else (threshold * size).clamp(max=_LARGEST)
