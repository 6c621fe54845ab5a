"""Tender's operand: channels biased, and grouped by scales that are powers of two apart, for each chunk of vectors.

Of a chunk of 256 vectors x and of channel c: the bias b_c = (max + min) / 2, and C_c = max |x_c - b_c|. With T the
largest C_c, group i = 0 .. G - 1 has the threshold T / 2^(G - 1 - i) and the scale threshold / (2^(bits - 1) - 1); a
channel goes to the first group whose threshold isn't below C_c. A number is stored as round((x_c - b_c) / scale).

Source: Tender, arXiv 2406.12930, section 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.arithmetic.operands import Block
from torchlamp.kernels.integer_products import Codes

#: Vectors, in the order of a call, that share their biases and scales.
CHUNK = 256


@dataclass(frozen=True, eq=False)
class Ranges:
    """The smallest and the largest number of every channel of every chunk, float32 (batch, chunks, K) each."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Ranges":
        """Those of vectors (batch, vectors, K), a last chunk being shorter."""
        chunks = [x[:, first : first + CHUNK] for first in range(0, max(1, x.shape[1]), CHUNK)]
        return cls(
            torch.stack([chunk.amin(1) for chunk in chunks], dim=1),
            torch.stack([chunk.amax(1) for chunk in chunks], dim=1),
        )

    def joined(self, other: "Ranges") -> "Ranges":
        """The ranges over both; either may have more chunks."""
        long, short = (self, other) if self.low.shape[1] >= other.low.shape[1] else (other, self)
        low, high, count = long.low.clone(), long.high.clone(), short.low.shape[1]
        low[:, :count] = torch.minimum(low[:, :count], short.low)
        high[:, :count] = torch.maximum(high[:, :count], short.high)
        return Ranges(low, high)


@dataclass(frozen=True, eq=False)
class Tables:
    """What the channels of each chunk are stored by.

    Attributes
    ----------
    bias : Tensor
        float32 (batch, chunks, K).
    powers : Tensor
        float32 whole numbers (batch, chunks, K): the group of each channel, 0 the one with the smallest scale.
    scales : Tensor
        float32 (batch, chunks, 1): the scale of group 0; that of group i is 2^i times as large. NaN where a number of
        the chunk isn't finite.
    largest : int
        The largest code.
    unsigned : bool
        Whether codes are 0 .. largest.
    groups : int
    """

    bias: Tensor
    powers: Tensor
    scales: Tensor
    largest: int
    unsigned: bool
    groups: int

    @classmethod
    def of(cls, ranges: Ranges, block: Block, *, unsigned: bool = False) -> "Tables":
        """Those that ranges ask for; unsigned numbers have no bias, and codes of all bits."""
        assert isinstance(block.element, int)
        low, high = ranges.low, ranges.high
        bias = torch.zeros_like(low) if unsigned else low / 2 + high / 2
        reach = torch.maximum(high - bias, bias - low)
        top = reach.amax(-1, keepdim=True)
        powers = torch.zeros_like(reach)
        for group in range(block.groups - 1):
            powers += reach > top * 2.0 ** (group + 1 - block.groups)
        if block.down:
            powers = (powers - 1).clamp_min(0)
        largest = 2**block.element - 1 if unsigned else block.largest_code
        scales = top / torch.full_like(top, largest) * 2.0 ** (1 - block.groups)
        usable = top.isfinite()
        bias = torch.where(usable, bias, 0.0)
        return cls(bias, powers, torch.where(usable, scales, torch.nan), largest, unsigned, block.groups)

    def spread(self, tensor: Tensor, count: int) -> Tensor:
        """One row for each of `count` vectors, (batch, vectors, n), of one for each chunk."""
        return tensor.repeat_interleave(CHUNK, dim=1)[:, :count]

    def codes(self, x: Tensor) -> tuple[Tensor, Codes]:
        """Vectors (batch, vectors, K) less their bias, and as they are stored; codes beyond the largest are clipped.

        Raises
        ------
        ValueError
            More chunks than the tables have.
        """
        count = x.shape[1]
        if count > CHUNK * self.bias.shape[1]:
            raise ValueError(
                f"{count} rows are {-(-count // CHUNK)} chunks of {CHUNK}, and Tender was calibrated on "
                f"{self.bias.shape[1]}: calibrate with longer windows"
            )
        left = x - self.spread(self.bias, count)
        powers, scales = self.spread(self.powers, count), self.spread(self.scales, count)
        codes = (left / (scales * torch.exp2(powers))).round()
        codes = codes.clamp(0 if self.unsigned else -self.largest, self.largest)
        codes = torch.where((scales > 0) & codes.isfinite(), codes, 0.0)
        return left, Codes(codes, scales, self.largest, max(1, x.shape[-1]), powers, self.groups)
