"""`hadamard`: both operands rotated by the Hadamard matrix, which spreads outlying elements over all."""

from dataclasses import dataclass

from torch import Tensor

from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.arithmetic.transforms.transform import Change, Side, Transform
from torchlamp.kernels.reference_decoding import hadamard


@dataclass(frozen=True)
class Hadamard(Transform):
    """q.k = (H q).(H k) for the orthogonal Hadamard matrix H; K must be a power of two.

    Helps quantised operands, whose groups then share the outliers, and hurts narrow sums, whose partial sums become
    large from the start. Source: QuaRot, arXiv 2404.00456; docs/transforms.md 4.
    """

    name = "hadamard"
    summary = "both operands rotated by the Hadamard matrix: for quantised operands, not for narrow sums"

    def check_size(self, size: int) -> None:
        """Refuse what is no power of two (ValueError)."""
        if size < 1 or size & (size - 1):
            raise ValueError(
                f"transform 'hadamard': sums of {size} terms; it needs a power of two, leave it out"
            )

    def fit(self, left: Moments, right: Moments, side: Side) -> Change:
        """The rotation, whatever the statistics."""
        self.check_size(left.total.shape[1])
        return Rotated()

    def operations(self, left: int, right: int, depth: int, *, fitted: bool) -> float:
        """log2 K additions for each number."""
        return float((left + right) * depth * (depth.bit_length() - 1))


class Rotated(Change):
    """Both operands times the Hadamard matrix over the root of its size."""

    def left(self, a: Tensor) -> Tensor:
        """Rows rotated."""
        return hadamard(a)

    def right(self, b: Tensor) -> Tensor:
        """Columns rotated."""
        return hadamard(b.mT).mT

    def moments(self, left: Moments, right: Moments) -> tuple[Moments, Moments]:
        """Those of the rotated operands; elements whose mutual moments aren't known are taken for uncorrelated."""
        size = left.total.shape[1]
        identity = left.total.new_zeros(1, size, size)
        identity.diagonal(dim1=1, dim2=2).fill_(1.0)
        matrix = hadamard(identity).expand(left.total.shape[0], -1, -1)
        return left.mapped(matrix), right.mapped(matrix)
