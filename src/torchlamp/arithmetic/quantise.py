"""The values that stored numbers stand for: `quantise`, one readable formula for each kind of scale."""

import torch
from torch import Tensor

from torchlamp.arithmetic.formats import Format
from torchlamp.arithmetic.operands import Block, Operand
from torchlamp.arithmetic.rounding import check_no_gradient
from torchlamp.arithmetic.tender import Ranges, Tables
from torchlamp.kernels.rounding import round_float64, round_to_grid
from torchlamp.kernels.specification import Grid

#: Numbers that are widened to float64 at a time.
_SLAB_NUMBERS = 2**23
_BF16_NAN, _BF16_INFINITY = 0x7FC0, 0x7F80
_E8M0_RANGE = 127
_FLOAT32_EXPONENT = 127


def quantise(x: Tensor, operand: str | Operand, dim: int = -1) -> Tensor:
    """The values that the stored numbers of a tensor stand for.

        >>> torchlamp.quantise(torch.tensor([1.0, 0.3, -0.02]), "int4/32")
        tensor([ 1.0049,  0.2871, -0.0000])

    Groups and rows run along `dim`, the dimension that a product sums over. A group with an infinity or NaN becomes
    NaN as a whole where it has a scale. Tender's chunks run along the dimension before that, once `dim` is the last.

    Parameters
    ----------
    x : Tensor
        float32, any shape, strides and device.
    operand : str or Operand
        For example ``"int8/32"`` or ``"mxfp4"``.
    dim : int
        The dimension of groups and rows.

    Returns
    -------
    float32, the shape of `x`; `x` itself where nothing changes.

    Raises
    ------
    ValueError
        An unknown operand, a dimension that isn't there, or a gradient that would be needed.
    TypeError
        Anything but a float32 tensor.
    """
    parsed = Operand.parse(operand)
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantise takes a float32 tensor, got {given}: convert with .float()")
    if not -max(x.ndim, 1) <= dim < max(x.ndim, 1):
        raise ValueError(f"dim={dim}: the tensor of shape {tuple(x.shape)} has no such dimension")
    block = parsed.block
    if block is None or x.numel() == 0:
        return x
    check_no_gradient("quantise", x)
    x = x.detach()
    if block.scale == "none":
        rounded = round_to_grid(x, Format.parse(str(block.element)).grid)
        return rounded.clone() if rounded is x else rounded
    rows = x.reshape(1) if x.ndim == 0 else x.movedim(dim, -1)
    if block.groups:
        return _biased(rows, block).movedim(-1, dim).reshape(x.shape)
    flat = rows.reshape(1, -1) if block.length < 0 else rows.reshape(-1, rows.shape[-1])
    return _rows(flat, block).view(rows.shape).movedim(-1, dim).reshape(x.shape)


def _biased(rows: Tensor, block: Block) -> Tensor:
    """Tender's stored values of (..., vectors, numbers), the bias included; a vector alone is a chunk."""
    vectors = rows if rows.ndim > 1 else rows[None]
    x = vectors.reshape(-1, *vectors.shape[-2:])
    tables = Tables.of(Ranges.of(x), block)
    values = tables.codes(x)[1].values + tables.spread(tables.bias, x.shape[1])
    return values.view(rows.shape)


def _rows(rows: Tensor, block: Block) -> Tensor:
    """Stored values of (rows, numbers), every row in groups of the block's length."""
    numbers = rows.shape[1]
    length = min(block.length, numbers) if block.length > 0 else numbers
    padding = -numbers % length
    second = _tensor_scale(rows, block)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    count = max(1, _SLAB_NUMBERS // numbers)
    for first in range(0, len(rows), count):
        part = rows[first : first + count]
        groups = torch.nn.functional.pad(part, (0, padding)).view(len(part), -1, length)
        out[first : first + count] = _groups(groups, block, second).flatten(1)[:, :numbers]
    return out


def _groups(groups: Tensor, block: Block, second: Tensor | None) -> Tensor:
    """Stored values of (rows, groups, length)."""
    magnitude = groups.abs().amax(-1, keepdim=True)
    if block.scale == "e8m0":
        return _microscaled(groups, magnitude, _element(block))
    if block.scale == "e4m3fn":
        assert second is not None
        return _two_level(groups, magnitude, second, _element(block))
    if isinstance(block.element, int):
        codes, scale = integer_codes(groups, block)
        return codes * scale
    grid = _element(block)
    scale = magnitude / torch.full_like(magnitude, grid.max_value)
    if grid.max_exponent == _FLOAT32_EXPONENT:
        # A format with float32's range needs no scale, and magnitude / 2^128 would lose its bits.
        scale = torch.where(magnitude.isfinite(), 1.0, torch.nan)
    return _nonzero(round_float64(groups.double() / scale.double(), grid) * scale, scale)


def integer_codes(groups: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Codes, float32 whole numbers (..., groups, length), and scales (..., groups, 1) of a symmetric integer operand.

    The scale is the largest magnitude over the largest code; as `reference_lowbit.pack_blocks` stores it. Codes of a
    group that is zero or not finite are 0, and the scale of one that isn't finite is NaN.
    """
    magnitude, largest = groups.abs().amax(-1, keepdim=True), block.largest_code
    scale = magnitude / torch.full_like(magnitude, largest)
    if block.scale == "bf16-up":
        # Rounded up to bfloat16, so that no code exceeds the largest.
        pattern = (scale.view(torch.int32).long() + 0xFFFF) >> 16
        pattern = torch.where(scale.isfinite() & (pattern < _BF16_INFINITY), pattern, _BF16_NAN)
        scale = (pattern << 16).to(torch.int32).view(torch.float32)
    codes = (groups / scale).round().clamp(-largest, largest)
    usable = (scale > 0) & (scale < torch.inf)
    return torch.where(usable, codes, 0.0), torch.where(scale < torch.inf, scale, torch.nan)


def _microscaled(groups: Tensor, magnitude: Tensor, grid: Grid) -> Tensor:
    """OCP MX: the scale is 2^(floor(log2(largest magnitude)) - the element's largest exponent), elements saturate."""
    exponent = torch.frexp(magnitude.double()).exponent - 1 - grid.max_exponent
    exponent = torch.where(magnitude > 0, exponent, -_E8M0_RANGE).clamp(-_E8M0_RANGE, _E8M0_RANGE)
    scale = torch.ldexp(torch.ones_like(magnitude, dtype=torch.float64), exponent)
    values = (round_float64(groups.double() / scale, grid).double() * scale).float()
    return torch.where(magnitude.isfinite(), values, torch.nan)


def _two_level(groups: Tensor, magnitude: Tensor, second: Tensor, grid: Grid) -> Tensor:
    """NVFP4: an e4m3fn scale for each group times a float32 scale of the tensor."""
    scales = Format.parse("e4m3fn-sat").grid
    wanted = magnitude.double() / grid.max_value / second.double()
    scale = round_float64(torch.where(second > 0, wanted, 0.0), scales) * second
    values = _nonzero(round_float64(groups.double() / scale.double(), grid) * scale, scale)
    return torch.where(magnitude.isfinite(), values, torch.nan)


def _tensor_scale(flat: Tensor, block: Block) -> Tensor | None:
    """NVFP4's second scale, which takes the largest number of the tensor to the largest scale times element."""
    if block.scale != "e4m3fn":
        return None
    top = _element(block).max_value * Format.parse("e4m3fn").max
    finite = torch.where(flat.isfinite(), flat, 0.0)
    return finite.abs().amax() / top


def _element(block: Block) -> Grid:
    """The element's grid; what is beyond its largest number saturates."""
    return Format.parse(f"{block.element}-sat").grid


def _nonzero(values: Tensor, scale: Tensor) -> Tensor:
    """Values, 0 where the scale is 0 and NaN where it isn't finite."""
    return torch.where(scale > 0, values, torch.where(scale == 0, 0.0, torch.nan)).where(
        scale < torch.inf, torch.nan
    )
