"""An installed wheel has its native kernels, and they equal the torch reference bit for bit. Run by .ci/wheels."""

import sys
from pathlib import Path

import torch

import torchlamp
from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.kernels import native
from torchlamp.kernels.products import products
from torchlamp.kernels.reference import products_reference


def main() -> None:
    """Fail with an AssertionError, or say which kernels run."""
    assert native.available(), native.why_not()
    home = Path(torchlamp.__file__).parent
    assert home.is_relative_to(sys.prefix), f"{home} isn't in {sys.prefix}"
    found = Path(native.extension().__file__)
    assert found.parent == home, found
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, *shape, generator=generator) for shape in ((17, 65), (65, 33)))
    for spelling in ("ps4", "ps7/block32", "ps13/promote128", "e5m2/unfused"):
        accumulation = Accumulator.parse(spelling).accumulation
        fast, slow = products(a, b, accumulation)[0], products_reference(a, b, accumulation)[0]
        assert torch.equal(fast, slow), spelling
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {version}: {found.name}, {native.instruction_set()} kernels, equal to the reference")


if __name__ == "__main__":
    main()
