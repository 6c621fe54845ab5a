"""Sums of integer products in a register of so many bits, as integer matrix units form them.

A register wraps around, as two's complement does. Additions and shifts to the left are exact modulo 2^bits, so that
what stands in it at the end is the exact sum whenever that fits, however often it wrapped on the way; and a sum
overflows exactly if it doesn't fit. So the fast way needs only exact sums, whatever their order: a matrix product in a
float type that holds them all. `torchlamp.kernels.reference_integers` takes the register step by step.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Sums of whole numbers up to these are exact in float32 and float64, in any order.
_EXACT_32, _EXACT_64 = 2**24, 2**53
#: Codes up to this are exact even where float32 products round their operands to bfloat16 or TF32.
_NARROW_CODE = 2**8


@dataclass(frozen=True)
class Register:
    """An integer register of `bits` bits.

    Without `shift` each run of numbers that share their two scales is summed by itself, scaled, and added to a float32
    total. With `shift` the numbers of the largest scale come first, and the register is shifted left by one bit before
    each next scale, half as large, also where no number has it; one scaling ends it.

    Source of the shifted form: Tender, arXiv 2406.12930, section 4.
    """

    bits: int = 32
    shift: bool = False


@dataclass(frozen=True, eq=False)
class Codes:
    """The integers that vectors are stored as, and their scales.

    Number k of a vector stands for codes[k] 2^powers[k] scales[k // length].

    Attributes
    ----------
    codes : Tensor
        float32 whole numbers (batch, vectors, K).
    scales : Tensor
        float32 (batch, vectors, ceil(K / length)); not finite where the vector wasn't.
    largest : int
        No code is larger in magnitude.
    length : int
        How many numbers share a scale; K or more: all of a vector.
    powers : Tensor or None
        float32 whole numbers (batch, vectors or a size that broadcasts, K), 0 .. groups - 1; None: all 0.
    groups : int
        One more than the largest power that there may be.
    """

    codes: Tensor
    scales: Tensor
    largest: int
    length: int
    powers: Tensor | None = None
    groups: int = 1

    @property
    def values(self) -> Tensor:
        """What the codes stand for, float32 (batch, vectors, K)."""
        depth = self.codes.shape[-1]
        scales = self.scales.repeat_interleave(self.length, dim=-1)[..., :depth]
        return self.codes * (scales if self.powers is None else scales * torch.exp2(self.powers))

    def __getitem__(self, vectors: slice) -> "Codes":
        """Some of the vectors of every batch."""
        powers = self.powers if self.powers is None else self.powers[:, vectors]
        return replace(self, codes=self.codes[:, vectors], scales=self.scales[:, vectors], powers=powers)

    def stacked(self, batch: int) -> "Codes":
        """The vectors of several batches one after the other in `batch` of them."""
        shape = (batch, -1, self.codes.shape[-1])
        powers = None if self.powers is None else self.powers.expand_as(self.codes).reshape(shape)
        scales = self.scales.reshape(batch, -1, self.scales.shape[-1])
        return replace(self, codes=self.codes.reshape(shape), scales=scales, powers=powers)

    def terms(self, count: int) -> "Codes":
        """The first numbers of every vector alone."""
        powers = None if self.powers is None else self.powers[..., :count]
        return replace(self, codes=self.codes[..., :count], powers=powers)

    def batches(self, some: slice) -> "Codes":
        """Some of the batches."""
        powers = self.powers if self.powers is None else self.powers[some]
        return replace(self, codes=self.codes[some], scales=self.scales[some], powers=powers)


@torch.no_grad()
def integer_products(
    left: Codes, right: Codes, register: Register, *, scaling: float | None = None, causal: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Inner products of coded vectors, each summed in a register.

    A sum S that stands in the register becomes fl(fl(S) fl(a b)), a and b the two scales of its numbers; without
    `shift` these are added up in float32, segment after segment, and within a segment the largest power first.

    Parameters
    ----------
    left : Codes
        (G, M, K).
    right : Codes
        (Gb, N, K), G a multiple of Gb, without powers: batch g uses batch g // (G // Gb).
    register : Register
        Its bits, and whether it shifts.
    scaling : float, optional
        A factor of the finished products, multiplied in float32.
    causal : int, optional
        Entry (i, j) is computed only where j <= i + causal; elsewhere it is 0.

    Returns
    -------
    The products, float32 (G, M, N), and bool (G, M, N): which of them had a sum that doesn't fit the register, and is
    off by a multiple of 2^bits; None where none can.
    """
    total: Tensor | None = None
    overflowed: Tensor | None = None
    for start, stop in segments(left, right):
        scales = _scales(left, right, start)
        for power in [None] if register.shift else range(left.groups - 1, -1, -1):
            exact, bound = _exact(
                _entering(left, power, start, stop), right.codes[..., start:stop], left, right
            )
            held, over = _wrapped(exact, bound * (stop - start), register.bits)
            part = held.float() * (scales * 2.0 ** (power or 0))
            total = part if total is None else total + part
            if over is not None:
                overflowed = over if overflowed is None else overflowed | over
    if total is None:
        total = left.codes.new_zeros(left.codes.shape[0], left.codes.shape[1], right.codes.shape[1])
    if scaling is not None:
        total = total * torch.tensor(scaling, dtype=torch.float32, device=total.device)
    if causal is not None:
        total = total.tril(causal)
        overflowed = None if overflowed is None else overflowed.tril(causal)
    return total, overflowed


def segments(left: Codes, right: Codes) -> list[tuple[int, int]]:
    """The runs of K along which neither operand changes its scale."""
    depth = left.codes.shape[-1]
    lengths = [codes.length for codes in (left, right) if codes.length < depth]
    step = math.gcd(*lengths) if lengths else max(1, depth)
    return [(start, min(start + step, depth)) for start in range(0, depth, step)]


def _entering(left: Codes, power: int | None, start: int, stop: int) -> Tensor:
    """Codes of a segment: those of one power, or all of them shifted to the left by theirs."""
    codes = left.codes[..., start:stop]
    if left.powers is None:
        return codes
    powers = left.powers[..., start:stop]
    return codes * torch.exp2(powers) if power is None else codes * (powers == power)


def _exact(a: Tensor, b: Tensor, left: Codes, right: Codes) -> tuple[Tensor, int]:
    """Exact sums (G, M, N) of whole numbers (G, M, k) and (Gb, N, k), and a bound on one term of them."""
    bound = left.largest * 2 ** (left.groups - 1) * right.largest
    largest = bound * a.shape[-1]
    narrow = max(left.largest * 2 ** (left.groups - 1), right.largest) <= _NARROW_CODE
    wide = torch.float64 if largest <= _EXACT_64 else torch.int64
    dtype = torch.float32 if largest <= _EXACT_32 and narrow else wide
    grouped = a.to(dtype).reshape(b.shape[0], -1, a.shape[-1])
    return torch.matmul(grouped, b.to(dtype).mT).reshape(*a.shape[:2], b.shape[1]), bound


def _wrapped(exact: Tensor, bound: int, bits: int) -> tuple[Tensor, Tensor | None]:
    """What stands in the register, and where that isn't the sum."""
    half = 2 ** (bits - 1)
    if bound < half:
        return exact, None
    whole = exact.long()
    overflowed = (whole >= half) | (whole < -half)
    return ((whole + half) & (2 * half - 1)) - half, overflowed


def _scales(left: Codes, right: Codes, start: int) -> Tensor:
    """fl(a b) of every pair of vectors, (G, M, N)."""
    a = left.scales[..., min(start // left.length, left.scales.shape[-1] - 1), None]
    b = right.scales[..., min(start // right.length, right.scales.shape[-1] - 1)][:, None, :]
    return a * b.repeat_interleave(a.shape[0] // b.shape[0], dim=0)
