"""Count multiply-adds of torch's products from their arguments (positional, then keyword) and their result."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def weighted_macs(arguments: Sequence[Any], out: Tensor) -> int:
    """Count those of a linear layer or a convolution. The second argument is the weight (out, in / groups, ...)."""
    tensors = _tensors(arguments)
    return out.numel() * tensors[1][0].numel() if len(tensors) > 1 and len(tensors[1]) else 0


def transposed_macs(arguments: Sequence[Any], out: Tensor) -> int:
    """Count those of a transposed convolution. The second argument is the weight (in, out / groups, ...)."""
    tensors = _tensors(arguments)
    return tensors[0].numel() * tensors[1][0].numel() if len(tensors) > 1 and len(tensors[1]) else 0


def matrix_macs(arguments: Sequence[Any], out: Tensor) -> int:
    """Count those of a product of the last two tensors among the arguments, (..., n, k) and (..., k, m)."""
    tensors = _tensors(arguments)
    return out.numel() * tensors[-2].shape[-1] if len(tensors) > 1 and tensors[-2].ndim else 0


def attention_macs(arguments: Sequence[Any], out: Tensor) -> int:
    """Count those of attention; the first arguments are query (..., n, k), key (..., m, k) and value (..., m, v)."""
    tensors = _tensors(arguments)
    return (tensors[0].numel() + out.numel()) * tensors[1].shape[-2] if len(tensors) > 2 else 0


def einsum_macs(arguments: Sequence[Any], out: Tensor) -> int:
    """Count those of a sum of products of n tensors: n - 1 for each term of each sum.

    >>> a, b = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4)
    >>> einsum_macs(("bij,bik->bjk", a, b), torch.einsum("bij,bik->bjk", a, b))
    120
    """
    tensors = _tensors(arguments)
    equation = next((value for value in arguments if isinstance(value, str)), None)
    if equation is None:  # letters given as numbers: torch.einsum(a, [0, 1], b, [1, 2])
        return matrix_macs(arguments, out)
    sizes: dict[str, int] = {}
    between = torch.Size()
    for term, x in zip(equation.replace(" ", "").partition("->")[0].split(","), tensors, strict=False):
        before, _, after = term.partition("...")
        for letter, size in (*zip(before, x.shape, strict=False), *zip(after[::-1], x.shape[::-1], strict=False)):
            sizes[letter] = max(size, sizes.get(letter, 1))
        if "..." in term:
            between = torch.broadcast_shapes(between, x.shape[len(before) : x.ndim - len(after)])
    return prod(sizes.values()) * between.numel() * max(len(tensors) - 1, 0)
