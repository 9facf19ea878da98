"""Running an ONNX file on the CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from torchquant.errors import ConfigError, require


@torch.no_grad()
def run_onnx(path: str | os.PathLike[str], x: Tensor, batch_size: int = 256, optimize: bool = False) -> Tensor:
    """The first output of an ONNX file for x, computed by ONNX Runtime on the CPU. Needs the extra `deploy`.

    x: (N, ...), cut into batches of `batch_size`, or of the size the file fixes. Returns (N, ...).
    `optimize=False` runs the graph node by node as it is written, in float32 between the codes. True
    fuses it into integer kernels, in ONNX Runtime's precise mode (`session.x64quantprecision`): without
    it, processors without VNNI saturate sums of int8 products at 16 bits. The kernels round the bias to
    multiples of the product of both steps; and 1.31 refuses a weight that two nodes share in this mode.
    Raises ConfigError for a file with several inputs, or N that is no multiple of a fixed batch.
    """
    runtime = require("onnxruntime", "deploy")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ConfigError(f"run_onnx feeds one input, {path} has {len(inputs)}: {', '.join(i.name for i in inputs)}")
    fixed = inputs[0].shape[0]
    if isinstance(fixed, int):
        if len(x) % fixed:
            raise ConfigError(f"{path} takes batches of exactly {fixed}, got {len(x)} rows")
        batch_size = fixed
    outputs = [session.run(None, {inputs[0].name: part.cpu().numpy()})[0] for part in x.split(batch_size)]
    return torch.cat([torch.from_numpy(output) for output in outputs])
