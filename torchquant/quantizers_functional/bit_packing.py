"""Pack integers of few bits without gaps.

The order is little-endian: bit k of number i is bit `(i * width + k) % 8` of byte `(i * width + k) // 8`, counted from
the lowest. So eight numbers take `width` bytes, and the code processes eight numbers at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant.errors import ConfigError

MAX_WIDTH = 32


def packed_bytes(width: int, numel: int) -> int:
    """Return the bytes that `numel` numbers of `width` bits take; the last byte may be partly empty."""
    return -(-numel * width // 8)


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Pack (*) integers in 0 .. 2**width - 1, of any integer type, into (ceil(numel * width / 8),) uint8.

    The order is that of `codes.flatten()`; bits after the last number are 0. Raises ConfigError for a width outside
    1..32 and for numbers that do not fit.

    >>> pack_bits(torch.tensor([1, 2, 3]), 3)
    tensor([209,   0], dtype=torch.uint8)
    """
    _check_width(width)
    numbers = codes.flatten().to(torch.int64)
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < 2**width:
        raise ConfigError(
            f"{width} bits hold 0..{2**width - 1}, got numbers from {int(numbers.min())} to {int(numbers.max())}"
        )
    groups = F.pad(numbers, (0, -len(numbers) % 8)).view(-1, 8)
    packed = torch.zeros(len(groups), width, dtype=torch.uint8, device=codes.device)
    for number, byte, shift in _overlaps(width):
        packed[:, byte] |= (_shifted(groups[:, number], shift) & 0xFF).to(torch.uint8)
    return packed.flatten()[: packed_bytes(width, len(numbers))]


def unpack_bits(packed: Tensor, width: int, numel: int) -> Tensor:
    """Unpack the (numel,) int64 numbers from the output of `pack_bits`. Raises ConfigError for a wrong size.

    >>> unpack_bits(torch.tensor([209, 0], dtype=torch.uint8), 3, 3)
    tensor([1, 2, 3])
    """
    _check_width(width)
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(width, numel),):
        raise ConfigError(
            f"{numel} numbers of {width} bits are {packed_bytes(width, numel)} bytes, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    groups = F.pad(packed, (0, -len(packed) % width)).view(-1, width)
    numbers = torch.zeros(len(groups), 8, dtype=torch.int64, device=packed.device)
    for number, byte, shift in _overlaps(width):
        numbers[:, number] |= _shifted(groups[:, byte].to(torch.int64), -shift)
    return (numbers & (2**width - 1)).flatten()[:numel]


def _overlaps(width: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, byte, left shift of the number in the byte) for each pair that shares bits, for eight numbers."""
    for number in range(8):
        first = number * width
        for byte in range(first // 8, (first + width - 1) // 8 + 1):
            yield number, byte, first - 8 * byte


def _shifted(numbers: Tensor, left: int) -> Tensor:
    return numbers << left if left >= 0 else numbers >> -left


def _check_width(width: int) -> None:
    if not (isinstance(width, int) and 1 <= width <= MAX_WIDTH):
        raise ConfigError(f"width must be a whole number from 1 to {MAX_WIDTH}, got {width!r}")
