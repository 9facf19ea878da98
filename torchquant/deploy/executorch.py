"""Write ExecuTorch programs whose layers run on XNNPACK's integer kernels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchquant._arguments import checked
from torchquant._files import write_whole
from torchquant.deploy.lowering.lowered import Lowered, lowered_as
from torchquant.deploy.lowering.qdq import BLOCK, dequantize_linear, onnx_nodes
from torchquant.deploy.onnx.export import checked_inputs, tell_of_left_out
from torchquant.errors import ExportError, one_line, require

LARGEST_ERROR = 0.05
"""Largest difference of an output from the model's, as a share of the largest output, that steps at ties may make."""
SHIFT = 128
"""XNNPACK takes signed codes: those that count from 0 on are moved down by half of their range."""

MOVES = (
    *(torch.ops.aten.flatten.using_ints, torch.ops.aten.view.default, torch.ops.aten.reshape.default),
    *(torch.ops.aten.permute.default, torch.ops.aten.transpose.int, torch.ops.aten.dropout.default),
    *(torch.ops.aten.squeeze.dim, torch.ops.aten.unsqueeze.default, torch.ops.aten.contiguous.default),
    torch.ops.aten.max_pool2d.default,
)
"""Operators that move values without changing them."""


@checked
@torch.no_grad()
def export_executorch(
    model: nn.Module | Lowered, path: str | os.PathLike[str], example_inputs: Any = None, verify: bool = True
) -> Path:
    """Write a calibrated model as a .pte program for ExecuTorch, with integers where XNNPACK has kernels.

    model: a calibrated model, quantized with "int8-openvino" for example, or what `lower(..., keep_signed=True)` made
    of it. Weights are int8 per channel, activations int8; biases are floats, of which XNNPACK makes codes. The program
    takes inputs of the shapes of `example_inputs`. `verify`: run it on them, and refuse to write a program whose
    outputs are farther than `LARGEST_ERROR` from the model's; XNNPACK rounds by scales in float32, so that codes may
    differ by a step.

    Needs the extra `executorch`. Source: pytorch.org/executorch, the XNNPACK backend. Raises ExportError for what has
    no form there and if the program computes something else, MissingDependencyError.
    """
    exir = require("executorch.exir", "executorch")
    require("executorch.kernels.quantized", "executorch")  # registers what is left to portable kernels
    partitioner = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    lowered = lowered_as(model, example_inputs, keep_signed=True, as_exported=True)
    inputs = checked_inputs(lowered.example_inputs)
    tell_of_left_out(lowered.not_run)
    program = torch.export.export(decomposed(lowered.form, inputs), inputs)
    try:
        edge = exir.to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()])
        contents = edge.to_executorch().buffer
    except (AssertionError, RuntimeError) as error:
        raise ExportError(f"ExecuTorch cannot lower {type(lowered.model).__name__}: {one_line(error)}") from error
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        temporary.write_bytes(contents)
        if verify:
            _verify(lowered, run_executorch(temporary, inputs), inputs)

    return write_whole(target, write)


@checked
def run_executorch(path: str | os.PathLike[str], inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run a .pte program on inputs of the shapes that it was written for. Raises MissingDependencyError."""
    runtime = require("executorch.runtime", "executorch")
    program = runtime.Runtime.get().load_program(Path(path).read_bytes())
    return tuple(program.load_method("forward").execute(list(checked_inputs(inputs))))


def _verify(lowered: Lowered, found: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    wanted = lowered.form(*inputs)
    for own, other in zip(wanted if isinstance(wanted, tuple | list) else (wanted,), found, strict=True):
        apart = float((own - other).abs().max() / own.abs().max().clamp_min(1e-12))
        if not apart <= LARGEST_ERROR:
            raise ExportError(
                f"the program computes something else: its output is {apart:.1%} of the largest output away from the "
                f"model's, and at most {LARGEST_ERROR:.0%} are allowed. Nothing was written; verify=False writes it"
            )


def decomposed(form: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Trace a deploy form with the operators of `quantized_decomposed`, which backends of torch.export recognise."""
    require("torch.ao.quantization.fx._decomposed", "executorch")
    with onnx_nodes():
        traced: Any = torch.export.export(form, inputs).module()
    for node in list(traced.graph.nodes):
        if node.target is torch.ops.onnx_symbolic._symbolic.default:
            sources, kind = node.args[0], node.args[1]
            attributes = dict(zip(node.kwargs["attr_keys"], node.kwargs["attr_ints"], strict=False))
            if kind not in _FORMS:
                raise ExportError(f"{_REFUSED.get(kind, f'{kind} has no form in ExecuTorch')}; or export to ONNX")
            with traced.graph.inserting_before(node):
                made = _FORMS[kind](traced, sources, attributes)
            made.meta = node.meta
            node.replace_all_uses_with(made)
            traced.graph.erase_node(node)
    _quantize_moved(traced)
    _one_for_each_reader(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    _drop_unused(traced)
    return traced


def _quantize(traced: Any, sources: list[fx.Node], attributes: dict[str, Any]) -> fx.Node:
    scale, zero_point = (_value(traced, source) for source in sources[1:])
    if scale.ndim:
        raise ExportError("activations with a scale for each channel have no form in ExecuTorch")
    return traced.graph.call_function(_op("quantize_per_tensor"), (sources[0], *_numbers(scale, zero_point)))


def _dequantize(traced: Any, sources: list[fx.Node], attributes: dict[str, Any]) -> fx.Node:
    scale = _value(traced, sources[1])
    zero_point = _value(traced, sources[2]) if len(sources) > 2 else torch.zeros((), dtype=torch.int32)
    if sources[0].op != "get_attr":
        if sources[0].target is not _op("quantize_per_tensor"):
            raise ExportError(f"{sources[0].name} computes on codes, which has no form in ExecuTorch")
        return traced.graph.call_function(_op("dequantize_per_tensor"), (sources[0], *_numbers(scale, zero_point)))
    codes = _value(traced, sources[0])
    if BLOCK in attributes or codes.dtype == torch.int32:
        values = dequantize_linear(codes, scale, zero_point, attributes.get("axis"), attributes.get(BLOCK))
        return _constant(traced, values)
    stored = _constant(traced, _signed(codes).to(torch.int8))
    if not scale.ndim:
        return traced.graph.call_function(_op("dequantize_per_tensor"), (stored, *_numbers(scale, zero_point)))
    sizes = (_constant(traced, scale), _constant(traced, _signed(zero_point).expand_as(scale).contiguous()))
    channels = (*sizes, attributes["axis"], -128, 127, torch.int8)
    return traced.graph.call_function(_op("dequantize_per_channel"), (stored, *channels))


def _mean(traced: Any, sources: list[fx.Node], attributes: dict[str, Any]) -> fx.Node:
    dims = list(range(2, sources[0].meta["val"].ndim))
    return traced.graph.call_function(torch.ops.aten.mean.dim, (sources[0], dims, True))


_FORMS: dict[str, Callable[[Any, list[fx.Node], dict[str, Any]], fx.Node]] = {
    **{"QuantizeLinear": _quantize, "DequantizeLinear": _dequantize, "GlobalAveragePool": _mean},
}


_REFUSED = {
    "Clip": "XNNPACK clips codes at the ends of 8 bits only: give activations all codes ('affine:8', not "
    "'symmetric=narrow', and 8 bits)"
}


def _quantize_moved(traced: Any) -> None:
    """Quantize again behind what only moves values, which changes none: XNNPACK looks for codes on both sides."""
    for node in list(traced.graph.nodes):
        if node.target not in MOVES or node.args[0].target is not _op("dequantize_per_tensor"):
            continue
        numbers, readers = node.args[0].args[1:], list(node.users)
        with traced.graph.inserting_after(node):
            codes = traced.graph.call_function(_op("quantize_per_tensor"), (node, *numbers))
        with traced.graph.inserting_after(codes):
            again = traced.graph.call_function(_op("dequantize_per_tensor"), (codes, *numbers))
        for reader in readers:
            reader.replace_input_with(node, again)


def _one_for_each_reader(traced: Any) -> None:
    """Give each reader of dequantized codes a node of its own, which may go into the reader's part of the program."""
    for node in list(traced.graph.nodes):
        if node.target is _op("dequantize_per_tensor"):
            for reader in list(node.users)[1:]:
                with traced.graph.inserting_before(reader):
                    reader.replace_input_with(node, traced.graph.call_function(node.target, node.args))


def _drop_unused(traced: Any) -> None:
    """Drop the tensors that other ones have replaced; the program would hold them too."""
    used = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*traced.named_buffers(), *traced.named_parameters()) if name not in used]:
        owner, _, last = name.rpartition(".")
        delattr(traced.get_submodule(owner), last)


def _op(name: str) -> Any:
    return getattr(torch.ops.quantized_decomposed, name).default


def _numbers(scale: Tensor, zero_point: Tensor) -> tuple[Any, ...]:
    """Return what the operators for one scale take beside the tensor."""
    return float(scale), int(_signed(zero_point)), -128, 127, torch.int8


def _signed(codes: Tensor) -> Tensor:
    return codes.to(torch.int64) - SHIFT * (codes.dtype == torch.uint8)


def _value(traced: Any, source: fx.Node) -> Tensor:
    found: Any = traced
    for name in str(source.target).split("."):
        found = getattr(found, name)
    return found


def _constant(traced: Any, value: Tensor) -> fx.Node:
    name = next(name for name in (f"stored_{i}" for i in itertools.count()) if not hasattr(traced, name))
    traced.register_buffer(name, value)
    return traced.graph.get_attr(name)
