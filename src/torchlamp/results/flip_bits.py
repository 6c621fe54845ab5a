"""One bit a token in hexadecimal digits: which tokens of a window flip."""

from collections.abc import Sequence


def pack_bits(bits: Sequence[bool]) -> str:
    """Two digits for each 8 bits, the first bit the highest; the last byte is filled with zeros."""
    padded = [*bits, *[False] * (-len(bits) % 8)]
    return "".join(
        f"{sum(int(padded[at + i]) << (7 - i) for i in range(8)):02x}" for at in range(0, len(padded), 8)
    )


def unpack_bits(digits: str, length: int) -> list[bool]:
    """The inverse of `pack_bits`.

    Raises
    ------
    ValueError
        These aren't the digits of `length` bits.
    """
    data = bytes.fromhex(digits)
    if len(data) != (length + 7) // 8:
        raise ValueError(f"{len(digits)} hexadecimal digits are no {length} bits")
    return [bool(data[at // 8] >> (7 - at % 8) & 1) for at in range(length)]
