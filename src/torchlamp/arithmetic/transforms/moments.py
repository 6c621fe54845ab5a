"""Statistics of an operand along the sum: means and second moments, which add up over calls and texts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the vectors of an operand, float64; all of a product's vectors have K elements.

    Vectors with a number that isn't finite are left out.
    """

    #: (Gb,): how many vectors.
    count: Tensor
    #: (Gb, K): sum of x_k.
    total: Tensor
    #: (Gb, K): sum of x_k^2.
    squares: Tensor
    #: (Gb, K, K): sum of x_k x_l, or None where no transform needs it.
    products: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, vectors: Tensor, with_products: bool = False) -> "Moments":
        """The statistics of vectors, (Gb, count, K), any strides."""
        wide = vectors.detach().double()
        count = wide.new_full(wide.shape[:1], float(wide.shape[1]))
        found = cls(count, *_sums(wide, with_products))
        # Squares of float32 numbers don't overflow float64: a sum that isn't finite has a term that isn't.
        if not bool(found.squares.isfinite().all()):
            finite = wide.isfinite().all(-1, keepdim=True)
            sums = _sums(torch.where(finite, wide, 0.0), with_products)
            found = cls(finite.sum((1, 2)).double(), *sums)
        return found

    def __add__(self, other: "Moments") -> "Moments":
        """The statistics of both together."""
        products = None
        if self.products is not None and other.products is not None:
            products = self.products + other.products
        return Moments(
            self.count + other.count, self.total + other.total, self.squares + other.squares, products
        )

    @property
    def mean(self) -> Tensor:
        """(Gb, K): 0 where there was no vector."""
        return self.total / self.count.clamp_min(1)[:, None]

    @property
    def energy(self) -> Tensor:
        """(Gb, K): mean of x_k^2."""
        return self.squares.clamp_min(0) / self.count.clamp_min(1)[:, None]

    @property
    def second(self) -> Tensor:
        """(Gb, K, K): mean of x x^T. ValueError where products between channels weren't collected."""
        if self.products is None:
            raise ValueError(
                "these statistics hold no products of channels, which transform 'balance' needs: calibrate with a "
                "policy that names it"
            )
        return self.products / self.count.clamp_min(1)[:, None, None]

    def repeated(self, times: int) -> "Moments":
        """The same statistics so many times, one after the other along the first dimension."""
        products = None if self.products is None else self.products.repeat(times, 1, 1)
        return Moments(
            self.count.repeat(times), self.total.repeat(times, 1), self.squares.repeat(times, 1), products
        )

    def centred(self, mean: Tensor) -> "Moments":
        """The statistics of x - mean, mean (Gb, K)."""
        count = self.count[:, None]
        squares = self.squares - 2 * mean * self.total + count * mean.square()
        products = None
        if self.products is not None:
            cross = self.total[:, :, None] * mean[:, None, :]
            products = (
                self.products
                - cross
                - cross.mT
                + self.count[:, None, None] * mean[:, :, None] * mean[:, None, :]
            )
        return Moments(self.count, self.total - count * mean, squares, products)

    def diagonal(self, order: Tensor | None, factors: Tensor | None) -> "Moments":
        """The statistics of the elements in an order (Gb, K), each then times its factor (Gb, K)."""
        total, squares, products = self.total, self.squares, self.products
        if order is not None:
            total, squares = total.gather(1, order), squares.gather(1, order)
            if products is not None:
                size = order.shape[1]
                rows = products.gather(1, order[:, :, None].expand(-1, -1, size))
                products = rows.gather(2, order[:, None, :].expand(-1, size, -1))
        if factors is not None:
            total, squares = total * factors, squares * factors.square()
            if products is not None:
                products = products * factors[:, :, None] * factors[:, None, :]
        return Moments(self.count, total, squares, products)

    def mapped(self, matrix: Tensor) -> "Moments":
        """The statistics of `matrix` x, matrix (Gb, K, K)."""
        total = (matrix @ self.total[..., None])[..., 0]
        if self.products is None:
            # Without the moments between elements these are taken for uncorrelated.
            return Moments(self.count, total, (matrix.square() @ self.squares[..., None])[..., 0])
        products = matrix @ self.products @ matrix.mT
        return Moments(self.count, total, products.diagonal(dim1=1, dim2=2).clone(), products)


def _sums(wide: Tensor, with_products: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Totals (Gb, K), squares (Gb, K), and products (Gb, K, K) or None, of float64 vectors (Gb, count, K)."""
    products = wide.mT @ wide if with_products else None
    squares = wide.square().sum(1) if products is None else products.diagonal(dim1=1, dim2=2).clone()
    return wide.sum(1), squares, products
