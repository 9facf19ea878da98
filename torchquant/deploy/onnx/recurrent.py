"""Write LSTM, GRU and RNN as the ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torchquant.deploy.lowering.qdq import in_graph
from torchquant.errors import ExportError

GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""The gates in ONNX's order, by their index in torch: i, o, f, c; z, r, h."""


def gate_order(layer: nn.RNNBase, rows: int) -> Tensor:
    """Return the rows of a weight or bias of the layer in ONNX's order of gates; those of a projection unchanged."""
    gates = GATES[_operator(layer)]
    if rows != len(gates) * layer.hidden_size:
        return torch.arange(rows)
    return torch.arange(rows).view(len(gates), -1)[list(gates)].flatten()


def _operator(layer: nn.RNNBase) -> str:
    return layer.mode.partition("_")[0]


def recurrent_nodes(
    layer: nn.RNNBase, weight: Callable[[str], Tensor], path: str, input: Any, hx: Any = None
) -> tuple[Tensor, Any]:
    """Run the forward of a layer in eval mode as ONNX nodes. weight: name -> its rows in the order of `gate_order`.

    Raises ExportError for inputs and layers that ONNX has no form for.
    """
    if isinstance(input, PackedSequence) or layer.proj_size:
        what = "a PackedSequence" if isinstance(input, PackedSequence) else f"proj_size={layer.proj_size}"
        raise ExportError(
            f"{path}: ONNX has no {_operator(layer)} with {what}. Give it padded batches and no projection, or leave "
            "the layer out of the file"
        )
    is_batch, axis = input.ndim == 3, 0 if layer.batch_first else 1
    x = input if is_batch else input.unsqueeze(axis)
    x = x.transpose(0, 1) if layer.batch_first else x
    states = [] if hx is None else [s if is_batch else s.unsqueeze(1) for s in (hx if isinstance(hx, tuple) else (hx,))]
    directions = 2 if layer.bidirectional else 1
    last: list[list[Tensor]] = []
    for level in range(layer.num_layers):
        own = [state[level * directions : (level + 1) * directions] for state in states]
        x, *finals = _one_level(layer, weight, level, x, own)
        last.append(finals)
    ends = [torch.cat(parts) for parts in zip(*last, strict=True)]
    y = x.transpose(0, 1) if layer.batch_first else x
    if not is_batch:
        y, ends = y.squeeze(axis), [end.squeeze(1) for end in ends]
    return y, tuple(ends) if len(ends) == 2 else ends[0]


def _one_level(
    layer: nn.RNNBase, weight: Callable[[str], Tensor], level: int, x: Tensor, states: list[Tensor]
) -> list[Tensor]:
    """Run one level: return output (L, N, directions * H), last states (directions, N, H). x: (L, N, features)."""
    ends = [f"l{level}", f"l{level}_reverse"][: 2 if layer.bidirectional else 1]
    operator = _operator(layer)

    def stacked(*names: str) -> Tensor:
        return torch.stack([torch.cat([weight(f"{name}_{end}") for name in names]) for end in ends])

    bias = stacked("bias_ih", "bias_hh") if layer.bias else None
    direction = "bidirectional" if layer.bidirectional else "forward"
    attributes: dict[str, Any] = {"hidden_size": layer.hidden_size, "direction": direction}
    if operator == "GRU":
        attributes["linear_before_reset"] = 1
    if operator == "RNN":
        attributes["activations"] = [layer.mode.removeprefix("RNN_").capitalize()] * len(ends)
    steps, batch, n = x.shape[0], x.shape[1], layer.hidden_size
    last = (len(ends), batch, n)
    shapes = [(steps, len(ends), batch, n), *[last] * (2 if operator == "LSTM" else 1)]
    inputs = (x, stacked("weight_ih"), stacked("weight_hh"), bias, None, *states)
    y, *finals = in_graph(operator, inputs, x.dtype, shapes, attributes)
    return [y.transpose(1, 2).flatten(2), *finals]
