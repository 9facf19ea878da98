"""Run an ONNX file on the CPU, and read the codes inside."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchquant._arguments import checked
from torchquant._shown import first_line, shown
from torchquant.deploy.onnx.graph import IS_CODES
from torchquant.deploy.onnx.kernels import Contents, kernel_of
from torchquant.errors import ConfigError, require

LEVELS = ("none", "integer", "all")
"""Optimization levels: node by node as written; fused to integer kernels; and also with own memory layouts."""


def open_session(model: str | os.PathLike[str] | bytes, level: str = "all", saved: Path | None = None) -> Any:
    """Open an InferenceSession on the CPU, in ONNX Runtime's precise mode (`session.x64quantprecision`).

    Without this mode, processors without VNNI saturate sums of products of uint8 and int8 at 16 bits. `saved`: file for
    the optimized graph. Raises ConfigError for a level that is not in `LEVELS`, MissingDependencyError.
    """
    runtime = require("onnxruntime", "deploy")
    if level not in LEVELS:
        raise ConfigError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    found = runtime.GraphOptimizationLevel
    levels = {"none": found.ORT_DISABLE_ALL, "integer": found.ORT_ENABLE_EXTENDED, "all": found.ORT_ENABLE_ALL}
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.graph_optimization_level = levels[level]
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    source = model if isinstance(model, bytes) else os.fspath(model)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ConfigError(f"there is no file {source}")
    try:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's error classes are not public
        what = "the model" if isinstance(source, bytes) else str(source)
        raise ConfigError(f"ONNX Runtime cannot run {what}: {first_line(error)}") from error


@checked
@torch.no_grad()
def run_onnx(path: str | os.PathLike[str], x: Tensor, batch_size: int = 256, optimize: bool = False) -> Tensor:
    """Compute the first output of an ONNX file for x with ONNX Runtime on the CPU. Needs the extra `deploy`.

    x: (N, ...), cut into batches of `batch_size`, or of the size the file fixes. Returns (N, ...).
    `optimize=False` runs the graph node by node as it is written, in float32 between the codes. True
    fuses it into integer kernels; see `open_session`. Raises ConfigError for a file with several inputs, or for N that
    is not a multiple of a fixed batch size.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    session = open_session(path, "all" if optimize else "none")
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ConfigError(f"run_onnx feeds one input; {path} has {len(inputs)}: {', '.join(i.name for i in inputs)}")
    fixed = inputs[0].shape[0] if inputs[0].shape else None
    if not x.ndim:
        raise ConfigError(f"x must have its samples along axis 0, got {shown(x)}")
    if isinstance(fixed, int):
        if len(x) % fixed:
            raise ConfigError(f"{path} takes batches of exactly {fixed}, got {len(x)} rows")
        batch_size = fixed
    outputs = [session.run(None, feeds_of(session, [part]))[0] for part in x.split(batch_size)]
    return torch.cat([torch.from_numpy(output) for output in outputs])


def feeds_of(session: Any, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Return input name -> array, in the order of the file. Raises ConfigError for inputs that do not fit."""
    wanted = session.get_inputs()
    if len(inputs) != len(wanted):
        names = ", ".join(entry.name for entry in wanted)
        raise ConfigError(f"the file takes {len(wanted)} inputs ({names}), got {len(inputs)}")
    for entry, x in zip(wanted, inputs, strict=True):
        kind = str(x.dtype).removeprefix("torch.")
        same = len(entry.shape) == x.ndim and all(
            not isinstance(n, int) or n == given for n, given in zip(entry.shape, x.shape, strict=True)
        )
        if not same or entry.type != f"tensor({_TYPES.get(kind, kind)})":
            raise ConfigError(f"input {entry.name} takes {entry.type} of shape {entry.shape}, got {shown(x)}")
    return {entry.name: x.detach().cpu().numpy() for entry, x in zip(wanted, inputs, strict=True)}


_TYPES = {"float32": "float", "float64": "double"}
"""Type names of ONNX Runtime that differ from torch's."""


class CodeReader:
    """Runs an ONNX file and returns the codes of its sites too. `kernels`: operator type -> number of nodes.

    path: a file of `export_onnx`. level: "none" or "integer", see `LEVELS`. `visible`: tensor of codes -> the tensor
    that holds these codes after optimization, itself or an equal one that it was merged into; codes that no tensor
    holds are missing. `makers`: the operator that computes each.
    """

    def __init__(self, path: str | os.PathLike[str], level: str) -> None:
        onnx = require("onnx", "deploy")
        proto = onnx.load(os.fspath(path))
        names = list(dict.fromkeys(out for node in proto.graph.node for out in node.output if IS_CODES.search(out)))
        contents = Contents()
        numbers = contents.of_graph(proto)
        if level != "none":
            with tempfile.TemporaryDirectory() as folder:
                saved = Path(folder) / "optimized.onnx"
                open_session(path, level, saved)
                proto = onnx.load(saved)
        self.proto = proto
        self.kernels = Counter(node.op_type for node in proto.graph.node)
        self._made_by = {out: node for node in proto.graph.node for out in node.output}
        kept = {name: numbers[name] for name in names if name in self._made_by}
        holders = {number: name for name, number in contents.of_graph(proto, kept).items() if name in self._made_by}
        holders |= {number: name for name, number in reversed(kept.items())}
        self.visible = {
            name: name if name in kept else holders[numbers[name]]
            for name in names
            if name in kept or numbers[name] in holders
        }
        self.makers = {name: kernel_of(holder, self._made_by, kept) for name, holder in self.visible.items()}
        self.outputs = [entry.name for entry in proto.graph.output]
        self._holders = list(dict.fromkeys(self.visible.values()))
        for name in self._holders:
            if name not in self.outputs:
                proto.graph.output.append(onnx.ValueInfoProto(name=name))
        self.session = open_session(proto.SerializeToString(), "none")

    def _maker(self, name: str) -> Any:
        """Return the node that computed the codes, looking through a clip of codes."""
        node = self._made_by[self.visible[name]]
        while node.op_type == "Clip" and node.input[0] in self._made_by:
            node = self._made_by[node.input[0]]
        return node

    def inputs_of(self, name: str, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the inputs of the node that made the codes `name`: name -> tensor."""
        onnx = require("onnx", "deploy")
        node = self._maker(name)
        stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in self.proto.graph.initializer}
        feeds = feeds_of(self.session, inputs)
        given = {name: torch.from_numpy(array) for name, array in feeds.items()}
        wanted = [i for i in node.input if i and i not in stored and i not in given]
        known = {entry.name for entry in self.proto.graph.output}
        probe = type(self.proto)()
        probe.CopyFrom(self.proto)
        for i in wanted:
            if i not in known:
                probe.graph.output.append(onnx.ValueInfoProto(name=i))
        arrays = open_session(probe.SerializeToString(), "none").run(wanted, feeds)
        computed = {i: torch.from_numpy(array) for i, array in zip(wanted, arrays, strict=True)}
        constants = {i: torch.from_numpy(stored[i].copy()) for i in node.input if i in stored}
        return {**computed, **constants, **{i: given[i] for i in node.input if i in given}}

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run the file and return (outputs, codes by name (int64))."""
        found = self.session.run([*self.outputs, *self._holders], feeds_of(self.session, inputs))
        arrays = [torch.from_numpy(array) for array in found]
        outputs, codes = arrays[: len(self.outputs)], arrays[len(self.outputs) :]
        held = {name: c.to(torch.int64) for name, c in zip(self._holders, codes, strict=True)}
        return outputs, {name: held[holder] for name, holder in self.visible.items()}
