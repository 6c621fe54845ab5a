"""Transforms: exact changes of the operands of a product before they are rounded or summed, by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Transform:
    """An exact change of the representative that a sum is formed in."""

    name: str

    @classmethod
    def parse(cls, spelling: "str | Transform") -> "Transform":
        """The transform of that name."""
        if isinstance(spelling, Transform):
            return spelling
        if spelling not in TRANSFORMS:
            raise ValueError(f"unknown transform {spelling!r}: allowed are {', '.join(TRANSFORMS)}")
        return TRANSFORMS[spelling]

    def __str__(self) -> str:
        return self.name


#: Every transform by its name.
TRANSFORMS = {name: Transform(name) for name in ("center", "sort", "balance", "hadamard", "smooth")}
