"""Transforms: exact changes of the operands of a product before they are rounded or summed (docs/transforms.md)."""

from torchlamp.arithmetic.transforms.balance import Balance
from torchlamp.arithmetic.transforms.bicenter import Bicenter
from torchlamp.arithmetic.transforms.center import Center
from torchlamp.arithmetic.transforms.hadamard import Hadamard
from torchlamp.arithmetic.transforms.headwise import Headwise
from torchlamp.arithmetic.transforms.smooth import Smooth
from torchlamp.arithmetic.transforms.sort import Sort
from torchlamp.arithmetic.transforms.transform import TRANSFORMS, Change, Transform, in_order

# A new transform is a line here. They are applied in this order: whose representative it is; means are taken off first;
# scales and bases follow; the order of terms is chosen last, in the basis that the sum is formed in.
TRANSFORMS.update(
    (transform.name, transform)
    for transform in (Headwise(), Center(), Bicenter(), Smooth(), Balance(), Hadamard(), Sort())
)

__all__ = ["TRANSFORMS", "Change", "Transform", "in_order"]
