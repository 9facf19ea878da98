"""Rotations of what layers hand on to each other, folded into their weights.

A residual stream x (row vectors) becomes `x R`: what writes to it and what reads it changes, the model does not. The
norm between must be an RMS norm without weights, for which `norm(x R) = norm(x) R`: its gamma goes into the readers,
and the mean that a layer norm takes off into the writers. All functions are for weights (rows, K) of linear layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import explained


@explained
def centred(weight: Tensor) -> Tensor:
    """A writer whose outputs have mean 0, `(I - 1 1' / n) W`; the mean is what a layer norm would take off.

    weight: (rows, ...), or a bias (rows,). Behind it a layer norm is an RMS norm. An embedding (tokens, n) is centred
    along its rows: `centred(E.mT).mT`. Source: Ashkboos et al. 2024, arXiv:2401.15024 (SliceGPT), section 3.

    >>> centred(torch.tensor([1.0, 3.0]))
    tensor([-1.,  1.])
    """
    return weight - weight.mean(0, keepdim=True)


@explained
def reading_norm(
    weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a reader that takes a norm's gamma and beta: `W diag(gamma)` and `b + W beta`.

    weight: (rows, K). bias: (rows,) or None; it stays None where beta is None. gamma, beta: (K,).

    >>> reading_norm(torch.tensor([[1.0, 2.0]]), None, torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0]))
    (tensor([[2., 6.]]), tensor([3.]))
    """
    shift = None if beta is None else weight @ beta
    return weight * gamma, bias if shift is None else (shift if bias is None else bias + shift)


@explained
def rotated_reader(weight: Tensor, rotation: Tensor) -> Tensor:
    """A weight (rows, K) that reads `x R` in place of x: `W R`, and an embedding (tokens, K) that gives `x R`.

    Computed in float64 and given back in the weight's type. Source: Ashkboos et al. 2024, arXiv:2404.00456, section 4.

    >>> rotated_reader(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([[-2.,  1.]])
    """
    return (weight.to(torch.float64) @ rotation.to(torch.float64)).to(weight.dtype)


@explained
def rotated_writer(weight: Tensor, rotation: Tensor) -> Tensor:
    """A weight (K, columns), or a bias (K,), whose outputs are `y R` in place of y: `R' W`.

    >>> rotated_writer(torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([-2.,  1.])
    """
    return (rotation.to(torch.float64).mT @ weight.to(torch.float64)).to(weight.dtype)


@explained
def rotated_values(value: Tensor, output: Tensor, rotation: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Value and output projections of attention with each head's values rotated: `R' W_v[h]` and `W_o[:, h] R`.

    value: (value heads * head_size, K); output: (rows, heads * head_size), query heads that share a value head next to
    each other; rotation: (head_size, head_size), of all heads, or (value heads, head_size, head_size); bias: of the
    value projection. Returns (value, output), and the bias if it is given.

    >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> rotated_values(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), turn)
    (tensor([[-2.],
            [ 1.]]), tensor([[-4.,  3.]]))
    """
    size = rotation.shape[-1]
    turns = rotation.expand(value.shape[0] // size, size, size)
    of_queries = turns.repeat_interleave(output.shape[1] // value.shape[0], 0)
    columns = output.unflatten(1, (-1, size)).movedim(1, 0)
    found = (
        rotated_writer(value.unflatten(0, (-1, size)), turns).flatten(0, 1),
        rotated_reader(columns, of_queries).movedim(0, 1).flatten(1),
    )
    return found if bias is None else (*found, rotated_writer(bias.view(-1, size, 1), turns).flatten())
