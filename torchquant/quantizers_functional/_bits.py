"""Masks of one bit an element, and codes of few bits, packed and unpacked eight bytes at a time by integer arithmetic.

A clipped gradient must remember one bit per element. PyTorch has no packed bool, but eight
0/1 bytes are one int64, and multiplying by the right constant gathers them into one byte. The
cost is in docs/decisions/0002.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant import kernels

_GATHER = 0x0102040810204080  # moves the flag in byte k to bit 56 + k; no two terms share a bit
_REPEAT = 0x0101010101010101  # copies a byte into all eight
_SELECT = 0x8040201008040201 - 2**64  # keeps bit k in byte k (as a signed 64-bit integer)
_CARRY = 0x7F7F7F7F7F7F7F7F  # added to a byte, sets its top bit unless the byte is 0
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""Bits of a code -> the integer that holds as many bytes as codes go into one byte."""


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies in memory as (N, H, W, C) and not also as (N, C, H, W)."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack (*) of exact 0 and 1, any float type, into (ceil(n / 8),) uint8, in memory order.

    >>> pack_mask(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    tensor([13], dtype=torch.uint8)
    """
    ordered = mask.permute(0, 2, 3, 1) if is_channels_last(mask) else mask
    flags = ordered.to(torch.int8).reshape(-1)
    if flags.numel() % 8:
        flags = F.pad(flags, (0, -flags.numel() % 8))
    return (flags.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def unpack_mask(bits: Tensor, shape: torch.Size, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """Unpack `bits` to the mask, of that shape and type; `channels_last` as it was when packed.

    >>> unpack_mask(torch.tensor([13], dtype=torch.uint8), torch.Size([4]), torch.float32)
    tensor([1., 0., 1., 1.])
    """
    words = bits.to(torch.int64).mul_(_REPEAT).bitwise_and_(_SELECT).add_(_CARRY)
    flags = words.bitwise_right_shift_(7).bitwise_and_(_REPEAT).view(torch.int8)[: shape.numel()].to(dtype)
    if not channels_last:
        return flags.view(shape)
    n, c, h, w = shape
    return flags.view(n, h, w, c).permute(0, 3, 1, 2)


def masked(grad: Tensor, bits: Tensor, channels_last: bool = False) -> Tensor:
    """Return grad times the mask that `bits` pack, in the memory order in which they are packed.

    >>> masked(torch.tensor([2.0, 3.0, 4.0, 5.0]), torch.tensor([13], dtype=torch.uint8))
    tensor([2., 0., 4., 5.])
    """
    grad = grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    kernel = kernels.find("masked", grad) or kernels.find_compiled("masked", grad)
    return unpack_mask(bits, grad.shape, grad.dtype, channels_last) * grad if kernel is None else kernel(grad, bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of 1, 2, 4 or 8 bits without gaps. (n,) uint8 -> (ceil(n * bits / 8),) uint8.

    >>> pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
    tensor([33,  3], dtype=torch.uint8)
    """
    if bits == 8:
        return codes
    per_byte = 8 // bits
    if len(codes) % per_byte:
        codes = F.pad(codes, (0, -len(codes) % per_byte))
    words = codes.view(_WORDS[bits])
    gathered = words
    for i in range(1, per_byte):
        gathered = gathered | (words >> i * (8 - bits))
    return gathered.to(torch.uint8)


def unpack_codes(codes: Tensor, bits: int, numel: int) -> Tensor:
    """Unpack what `pack_codes` made. (ceil(n * bits / 8),) uint8 -> (n,) uint8.

    >>> unpack_codes(torch.tensor([33, 3], dtype=torch.uint8), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    if bits == 8:
        return codes
    words = codes.to(_WORDS[bits])
    spread = words
    for i in range(1, 8 // bits):
        spread = spread | (words << i * (8 - bits))
    mask = sum((2**bits - 1) << 8 * i for i in range(8 // bits))
    return (spread & mask).view(torch.uint8)[:numel]
