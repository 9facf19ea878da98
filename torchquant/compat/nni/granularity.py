"""NNI's granularities in the words of spec strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchquant._shown import shown
from torchquant.errors import ConfigError

GRANULARITIES = ("default", "out_channel", "in_channel", "per_channel")


def spec_ending(where: str, granularity: Any, tensor: Tensor | None) -> str:
    """Return the ending of a spec string for a granularity; "" is one scale for the whole tensor.

    A list has the size of a block along each axis, -1 for a whole axis; a shorter one speaks of the last axes, and the
    others have blocks of 1. `tensor`: the weight, None for an input or output. Raises ConfigError.

    >>> import torch
    >>> spec_ending("conv1", "in_channel", torch.zeros(8, 4, 3, 3)), spec_ending("fc", [1, 16], torch.zeros(8, 64))
    ('/in_channel', '/group=16')
    """
    if granularity is None or granularity == "default":
        return ""
    if isinstance(granularity, list | tuple):
        return _of_blocks(where, granularity, tensor)
    if granularity not in GRANULARITIES:
        raise ConfigError(
            f"{where}: granularity must be one of {', '.join(GRANULARITIES)}, or a list of block sizes, got "
            f"{shown(granularity)}"
        )
    if tensor is None:
        if granularity != "per_channel":
            raise ConfigError(
                f"{where}: granularity of an input or output must be default or per_channel, got {shown(granularity)}"
            )
        return "/channel"
    if granularity == "in_channel":
        if tensor.ndim < 2:
            raise ConfigError(f"{where}: it has no input channels; granularity must be default or out_channel")
        return "/in_channel"
    return "/channel"


def _of_blocks(where: str, granularity: Sequence[Any], tensor: Tensor | None) -> str:
    sizes, mode, filling = granularity, "front", 1
    if granularity and isinstance(granularity[0], list | tuple):  # [sizes, padding mode, padding value]
        given = [*granularity, mode, filling][:3] if len(granularity) == 1 else [*granularity, filling][:3]
        sizes, mode, filling = given
    if not sizes or not all(type(size) is int and (size > 0 or size == -1) for size in sizes):
        raise ConfigError(
            f"{where}: granularity must list the block size along each axis, -1 for a whole axis, got "
            f"{shown(granularity)}"
        )
    if tensor is None:
        if [*sizes] in ([-1, 1], [-1, 1, -1, -1]):
            return "/channel"
        raise ConfigError(
            f"{where}: an input or output has one scale, or one a channel (per_channel); got the blocks "
            f"{shown(granularity)}"
        )
    missing = [filling] * (tensor.ndim - len(sizes))
    blocks = [*missing, *sizes] if mode == "front" else [*sizes, *missing]
    if len(blocks) != tensor.ndim:
        raise ConfigError(
            f"{where}: granularity {shown(granularity)} has more axes than its shape {tuple(tensor.shape)}"
        )
    whole = [size == -1 or size >= n for size, n in zip(blocks, tensor.shape, strict=True)]
    if all(whole):
        return ""
    one_row = blocks[0] == 1 or tensor.shape[0] == 1
    if one_row and all(whole[1:]):
        return "/channel"
    if whole[0] and tensor.ndim > 1 and blocks[1] == 1 and all(whole[2:]):
        return "/in_channel"
    if one_row and tensor.ndim > 1 and all(whole[2:]):
        return f"/group={blocks[1] * tensor[0, 0].numel()}"
    if tensor.ndim == 1:
        raise ConfigError(f"{where}: it has one axis; granularity must be default or out_channel, got {shown(sizes)}")
    return "/block=" + "x".join("-1" if is_whole else str(size) for size, is_whole in zip(blocks, whole, strict=True))
