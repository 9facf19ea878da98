"""The values between the layers and the steps of LSTM, GRU and RNN, computed layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Weights = Mapping[str, Tensor]
"""Name of a weight -> the tensor in its place; weights that are not named are the layer's own."""


def layer_input(layer: nn.RNNBase, weights: Weights, name: str, x: Any, hx: Any, keep: Tensor | None = None) -> Tensor:
    """Return the rows (n, K) that the input weight of one layer multiplies: the input, or the lower layer's output.

    name: of the weight, such as "weight_ih_l1_reverse". x, hx: the arguments of the call. keep: bool, laid out as the
    first two axes of x, true for the tokens that count.
    """
    level = _parts(name)[1]
    for below in range(level):
        x = _run_layer(layer, weights, below, x, hx)
    steps, valid = _by_step(x, layer.batch_first, keep)
    return steps[valid]


def states_before(
    layer: nn.RNNBase, weights: Weights, name: str, x: Any, hx: Any, keep: Tensor | None = None
) -> Tensor:
    """Return the rows (n, K) that a weight of the recurrence multiplies: the state before each step.

    For "weight_hr", the weight of an LSTM with projections, the states that it projects. Other arguments as for
    `layer_input`.
    """
    part, level, is_reverse = _parts(name)
    for below in range(level):
        x = _run_layer(layer, weights, below, x, hx)
    y, valid = _by_step(_run_layer(layer, weights, level, x, hx, part == "hr"), layer.batch_first, keep)
    directions = 2 if layer.bidirectional else 1
    states = y.chunk(directions, -1)[is_reverse]
    if part == "hr":
        return states[valid]
    first = states.new_zeros(states.shape[1:]) if hx is None else _first_state(hx)[level * directions + is_reverse]
    if not is_reverse:
        return torch.cat([first.expand_as(states[:1]), states[:-1]])[valid]
    following = torch.cat([states[1:], first.expand_as(states[:1])])
    if isinstance(x, PackedSequence):  # a sequence that ends earlier begins earlier
        lengths = pad_packed_sequence(x)[1].to(y.device)
        is_last = torch.arange(len(y), device=y.device)[:, None] == lengths - 1
        following = torch.where(is_last[..., None], first, following)
    return following[valid]


def _parts(name: str) -> tuple[str, int, bool]:
    """Split the name of a weight into its kind, its layer, and whether it is that of the reverse direction."""
    return name.split("_")[1], _level(name), name.endswith("_reverse")


def _first_state(hx: Any) -> Tensor:
    state: Tensor = hx[0] if isinstance(hx, tuple) else hx
    return state


def _run_layer(layer: nn.RNNBase, weights: Weights, level: int, x: Any, hx: Any, unprojected: bool = False) -> Any:
    """Run one layer of a recurrent module on x, in all its directions.

    `unprojected`: give the states of an LSTM before their projection: those of an LSTM without one whose recurrent
    weight has the projection multiplied into it.
    """
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    all_weights = {**dict(layer.named_parameters(recurse=False)), **weights}
    mine = {name.replace(f"_l{level}", "_l0"): w for name, w in all_weights.items() if _level(name) == level}
    if hx is not None:
        own = slice(level * len(ends), (level + 1) * len(ends))
        hx = tuple(state[own] for state in hx) if isinstance(hx, tuple) else hx[own]
    if unprojected:
        projections = [mine.pop(f"weight_hr_l0{end}") for end in ends]
        for end, projection in zip(ends, projections, strict=True):
            mine[f"weight_hh_l0{end}"] = mine[f"weight_hh_l0{end}"] @ projection
        if hx is not None:
            first = [state @ torch.linalg.pinv(p).mT for p, state in zip(projections, hx[0], strict=True)]
            hx = (torch.stack(first), hx[1])
    size = (x.data if isinstance(x, PackedSequence) else x).shape[-1]
    return functional_call(_one_layer(layer, size, unprojected), mine, (x, hx))[0]


def _one_layer(layer: nn.RNNBase, input_size: int, unprojected: bool) -> nn.RNNBase:
    """Make a module without weights that computes as one layer of a recurrent module."""
    kind = next(kind for kind in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(layer, kind))
    more: dict[str, Any] = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
    if layer.proj_size and not unprojected:
        more["proj_size"] = layer.proj_size
    same = {name: getattr(layer, name) for name in ("bias", "batch_first", "bidirectional")}
    return kind(input_size, layer.hidden_size, **same, **more, device="meta")


def _level(name: str) -> int:
    """Return the layer that a parameter such as "bias_ih_l1_reverse" is of."""
    found = re.search(r"_l(\d+)", name)
    return -1 if found is None else int(found[1])


def _by_step(x: Any, is_batch_first: bool, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return values as (steps, N, features), and which of them count, (steps, N) bool."""
    if isinstance(x, PackedSequence):
        steps, lengths = pad_packed_sequence(x)
        return steps, torch.arange(len(steps))[:, None].lt(lengths).to(steps.device)
    if x.ndim == 2:
        x, is_batch_first = x[:, None], False
    steps = x.transpose(0, 1) if is_batch_first else x
    if keep is not None:
        return steps, keep.mT if is_batch_first else keep
    return steps, torch.ones(steps.shape[:2], dtype=torch.bool, device=steps.device)
