"""Low-bit copies of matrices, packed and multiplied by the native kernel where it runs, in torch elsewhere.

They are made of plain tensors, so that they can be copied, pickled and shared between threads. The layout, and the
formulas that both kinds of kernels follow, are in `torchlamp.kernels.reference_lowbit`; `docs/decoding.md` says
what they are for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchlamp.kernels import reference_lowbit
from torchlamp.kernels.constants import ROWS
from torchlamp.kernels.dispatch import NativeKernels, NativeObject, as_native, native_for
from torchlamp.kernels.full_rows import FULL, slabs
from torchlamp.kernels.reference_lowbit import block_count, code_bytes, group_count

#: Bits that a code can have.
BITS = (4, 8, 12)


@dataclass(eq=False)
class LowBitMatrix:
    """A low-bit copy of a matrix (rows, columns): integers of 4, 8 or 12 bits, a bfloat16 scale per row and 32 columns.

    Made by `pack`. Products with it read `bytes` bytes. An infinity or NaN in the matrix makes the products of its row
    NaN, one in a vector those of the vector.
    """

    #: uint8 and uint16 (bfloat16 patterns), flat: the layout of `reference_lowbit.pack_blocks`.
    codes: Tensor
    scales: Tensor
    #: float32, one for each row of the blocks; `errors` shows those of the matrix.
    block_errors: Tensor
    bits: int
    rows: int
    columns: int
    #: Over the tensors above.
    _native: NativeObject = field(default_factory=NativeObject, init=False, repr=False)

    @classmethod
    @torch.no_grad()
    def pack(cls, weight: Tensor, bits: int) -> "LowBitMatrix":
        """Quantise a matrix.

        Parameters
        ----------
        weight
            (rows, columns) float32, bfloat16 or float16 on the CPU, any strides; either size may be 0. Half-precision
            numbers are widened exactly, some rows at a time.
        bits
            4, 8 or 12.

        Raises
        ------
        ValueError
            For other bits, shapes or devices.
        TypeError
            For other dtypes.
        """
        if bits not in BITS:
            raise ValueError(f"bits={bits}: LowBitMatrix takes 4, 8 or 12")
        _check(weight, "a weight", "(rows, columns)", FULL)
        rows, columns = weight.shape
        native, weight = native_for(), as_native(weight, "any")
        if native is None:
            packed = [reference_lowbit.pack_blocks(slab, bits) for _, slab in slabs(weight, ROWS)]
            packed = packed or [_empty_blocks(rows, columns, bits)]
            codes, scales, errors = (torch.cat(parts) for parts in zip(*packed, strict=True))
            return cls(codes, scales, errors, bits, rows, columns)
        matrix = cls(*_empty_blocks(rows, columns, bits), bits, rows, columns)
        for first, slab in slabs(weight, ROWS):
            part = matrix.part(first, len(slab))
            part.kernel(native).pack(as_native(slab), torch.get_num_threads())
        return matrix

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], bits: int, rows: int, columns: int) -> "LowBitMatrix":
        """The copy of a matrix (rows, columns) over tensors that `tensors` once gave; nothing is computed.

        Raises
        ------
        ValueError
            Tensors of other sizes or dtypes than such a copy has.
        """
        padded = block_count(rows) * ROWS
        check_kept(tensors, "codes", (padded * code_bytes(bits, columns),), torch.uint8)
        check_kept(tensors, "scales", (padded * group_count(columns),), torch.int16)
        check_kept(tensors, "errors", (padded,), torch.float32)
        scales = tensors["scales"].view(torch.uint16)
        return cls(tensors["codes"], scales, tensors["errors"], bits, rows, columns)

    def tensors(self) -> dict[str, Tensor]:
        """All that the copy consists of, for `of`: codes uint8, scales int16 (bfloat16 patterns), errors float32."""
        return {"codes": self.codes, "scales": self.scales.view(torch.int16), "errors": self.block_errors}

    @torch.no_grad()
    def products(self, x: Tensor) -> Tensor:
        """The matrix times vectors, which are rounded to 16-bit integers first.

        Parameters
        ----------
        x
            (vectors, columns) float32 on the CPU, any strides.

        Returns
        -------
        float32 (vectors, rows). `reference_lowbit.products` bounds the difference from the quantised operands' exact
        products. The native kernel's results depend neither on the instruction set, nor on the number of threads,
        nor on what other vectors there are.

        Raises
        ------
        ValueError
            When the shape or the device doesn't fit.
        TypeError
            When `x` isn't float32.
        """
        x = check_vectors(x, self.columns)
        native = native_for(x)
        if native is None:
            return reference_lowbit.products(self.codes, self.scales, self.bits, self.rows, x)
        out = torch.empty(len(x), self.rows)
        self.kernel(native).products(x, out, torch.get_num_threads())
        return out

    def split(self, sizes: list[int]) -> "list[LowBitMatrix]":
        """Rows one below the other as matrices of their own, over the same memory.

        Raises
        ------
        ValueError
            Sizes that don't add up to the rows, or a part that doesn't begin a block of `ROWS` rows.
        """
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        if sum(sizes) != self.rows or any(start % ROWS for start in starts):
            raise ValueError(
                f"sizes {sizes} don't split {self.rows} rows: all but the last must be multiples of {ROWS}, and their "
                "sum the rows"
            )
        return [self.part(start, size) for start, size in zip(starts, sizes, strict=True)]

    def part(self, start: int, size: int) -> "LowBitMatrix":
        """Rows from `start`, a multiple of `ROWS`, as a matrix of their own over the same memory."""
        code, scale = code_bytes(self.bits, self.columns), group_count(self.columns)
        end = start + block_count(size) * ROWS
        tensors = (self.codes[start * code : end * code], self.scales[start * scale : end * scale])
        return LowBitMatrix(*tensors, self.block_errors[start:end], self.bits, size, self.columns)

    @property
    def errors(self) -> Tensor:
        """float32 (rows,): at least the 2-norm of each row minus its copy, to 1e-6; not finite where the row isn't."""
        return self.block_errors[: self.rows]

    @property
    def bytes(self) -> int:
        """Memory of codes and scales."""
        return self.codes.numel() + 2 * self.scales.numel()

    def dequantised(self) -> Tensor:
        """What the copy stands for: float32 (rows, columns), NaN in groups of 32 that aren't finite."""
        return reference_lowbit.unpack_blocks(self.codes, self.scales, self.bits, self.rows, self.columns)

    def kernel(self, native: NativeKernels) -> Any:
        """The native object over the copy."""
        return self._native.get(native, self._make)

    def _make(self, native: NativeKernels) -> Any:
        tensors = (self.codes, self.scales, self.block_errors)
        return native.extension.BlockMatrix(
            native.instruction_set, *tensors, self.bits, self.rows, self.columns
        )

    def __getstate__(self) -> dict[str, Any]:
        # Without the native object, and with scales in a dtype that torch can pickle.
        return {**self.__dict__, "_native": NativeObject(), "scales": self.scales.view(torch.int16)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, scales=state["scales"].view(torch.uint16))


def check_kept(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """ValueError where a tensor of a copy that was kept is missing, or isn't of this shape and dtype."""
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape or found.dtype != dtype:
        got = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
        raise ValueError(f"a kept low-bit copy has {got} as its {name} in the place of {shape} {dtype}")


def serves_many() -> bool:
    """Whether steps of many tokens are served from low-bit copies: plain C++ is slower than torch's products."""
    native = native_for()
    return native is None or native.instruction_set != "portable"


def check_vectors(x: Tensor, columns: int) -> Tensor:
    """Vectors that a kernel can read: contiguous, without a gradient.

    Raises ValueError and TypeError for what isn't float32 (vectors, columns) on the CPU.
    """
    _check(x, "vectors", "(vectors, columns)")
    if x.shape[1] != columns:
        raise ValueError(
            f"vectors of shape {tuple(x.shape)} don't fit a matrix of {columns} columns: "
            f"they must be (vectors, {columns})"
        )
    return as_native(x, "all")


def _empty_blocks(rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and errors for a matrix, all zero: the kernel doesn't write rows that only fill up a block."""
    padded = block_count(rows) * ROWS
    return (
        torch.zeros(padded * code_bytes(bits, columns), dtype=torch.uint8),
        torch.zeros(padded * group_count(columns), dtype=torch.uint16),
        torch.zeros(padded),
    )


def _check(x: Tensor, what: str, shape: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    if x.dtype not in dtypes:
        half = " or of half precision" if len(dtypes) > 1 else ""
        raise TypeError(f"{what} must be float32{half}, got {x.dtype}: convert with .float()")
    if x.device.type != "cpu":
        raise ValueError(f"{what} must be on the CPU, got {x.device}: move with .cpu()")
    if x.dim() != 2:
        raise ValueError(f"{what} must have shape {shape}, got {tuple(x.shape)}")
