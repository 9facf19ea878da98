"""ONNX files of real networks: the float one, running them, counting what is stored as integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real.networks import Batches, Real
from benchmarks.real.peers._base import FLOAT_FILE
from torchquant.errors import require

PRECISE = "1"
"""session.x64quantprecision: sums are exact on processors without VNNI too."""


def float_file(network: Real, folder: Path) -> Path:
    """The float model, written once by torch's exporter with the operator set that `export_onnx` takes."""
    path = folder / FLOAT_FILE
    if not path.exists():
        torch.onnx.export(
            network.model,
            network.calibration[0],
            path,
            dynamo=True,
            opset_version=20,
            verbose=False,
            external_data=False,
        )
    return path


def prepared_file(network: Real, folder: Path) -> Path:
    """The float file after ONNX Runtime's own preparation for its quantization tools."""
    path = folder / "prepared.onnx"
    if not path.exists():
        prepare = require("onnxruntime.quantization.shape_inference", "deploy")
        source = str(float_file(network, folder))
        try:
            prepare.quant_pre_process(source, str(path))
        except Exception:  # its symbolic shapes know no LSTM without states
            prepare.quant_pre_process(source, str(path), skip_symbolic_shape=True)
    return path


class Feeds:
    """Batches as ONNX Runtime asks for them."""

    def __init__(self, path: Path, batches: Batches) -> None:
        names = [item.name for item in require("onnx", "deploy").load(path, load_external_data=False).graph.input]
        self.feeds: Iterator[dict[str, Any]] = iter(
            [{n: t.numpy() for n, t in zip(names, batch, strict=True)} for batch in batches]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def session_call(path: Path, precision: str = PRECISE, threads: int | None = None) -> Callable[..., Any]:
    """A file as a function of tensors: the output, or the tuple of them."""
    runtime = require("onnxruntime", "deploy")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", precision)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def call(*inputs: Tensor) -> Any:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        outputs = [torch.from_numpy(array) for array in session.run(None, feed)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return call


def integer_weights(path: Path) -> list[int]:
    """How many numbers each tensor of two axes and more holds that is stored as integers of at most 8 bits."""
    onnx = require("onnx", "deploy")
    kinds = [getattr(onnx.TensorProto, name) for name in ("INT8", "UINT8", "INT4", "UINT4")]
    stored = onnx.load(path).graph.initializer
    return [math.prod(item.dims) for item in stored if item.data_type in kinds and len(item.dims) > 1]
