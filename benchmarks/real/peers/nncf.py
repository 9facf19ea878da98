"""NNCF's post-training quantization of the OpenVINO model, with each of its presets."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real.networks import Real
from benchmarks.real.peers._base import TRANSFORMERS, Peer, Quantized
from benchmarks.real.peers.onnx_files import float_file
from torchquant.errors import require


def quantized(network: Real, folder: Path, preset: str, model_type: str | None = None) -> Quantized:
    nncf, openvino = require("nncf", "bench"), require("openvino", "openvino")
    nncf.set_log_level(logging.ERROR)
    model = openvino.Core().read_model(float_file(network, folder))
    model = nncf.quantize(
        model,
        nncf.Dataset([tuple(tensor.numpy() for tensor in batch) for batch in network.calibration]),
        preset=getattr(nncf.QuantizationPreset, preset),
        subset_size=len(network.calibration),
        model_type=None if model_type is None else getattr(nncf.ModelType, model_type),
    )
    return Quantized(compiled_call(model), quantized_weights(model))


def compressed(network: Real, folder: Path, group: int = -1, algorithm: str = "") -> Quantized:
    """4-bit weights of linear layers, a scale for each `group` weights of a row, or each row (-1); tables stay float.

    `algorithm`: "awq", "scale_estimation", "gptq", or none.
    """
    nncf, openvino = require("nncf", "bench"), require("openvino", "openvino")
    nncf.set_log_level(logging.ERROR)
    feeds = [tuple(tensor.numpy() for tensor in batch) for batch in network.calibration]
    model = nncf.compress_weights(
        openvino.Core().read_model(float_file(network, folder)),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=group,
        all_layers=True,
        backup_mode=nncf.BackupMode.NONE,
        ignored_scope=nncf.IgnoredScope(types=["Gather"], validate=False),
        **({"dataset": nncf.Dataset(feeds), algorithm: True, "subset_size": len(feeds)} if algorithm else {}),
    )
    return Quantized(compiled_call(model), quantized_weights(model))


def compiled_call(model: Any) -> Any:
    """An OpenVINO model as a function of tensors. Its FakeQuantize nodes compute in float32.

    As integers their sums would saturate on processors without VNNI.
    """
    openvino = require("openvino", "openvino")
    hints = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
    compiled = openvino.Core().compile_model(model, "CPU", hints)

    def call(*inputs: Tensor) -> Any:
        outputs = [torch.from_numpy(array.copy()) for array in compiled([t.numpy() for t in inputs]).values()]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return call


def quantized_weights(model: Any) -> list[int]:
    """How many numbers each constant of two axes and more holds that passes a FakeQuantize or is stored in 8 bits."""
    found: dict[str, int] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and len(node.shape) > 1:
            readers = _readers(node)
            readers += [
                after for reader in readers if reader.get_type_name() == "Convert" for after in _readers(reader)
            ]
            is_read = any(reader.get_type_name() == "FakeQuantize" and _reads(reader, node) for reader in readers)
            if is_read or node.get_element_type().get_type_name() in ("i8", "u8", "i4", "u4"):
                found[node.get_friendly_name()] = math.prod(node.shape)
    return list(found.values())


def _readers(node: Any) -> list[Any]:
    return [reader.get_node() for reader in node.output(0).get_target_inputs()]


def _reads(fake_quantize: Any, constant: Any) -> bool:
    """Whether the constant is what is quantized, rather than a bound of it."""
    source = fake_quantize.input_value(0).get_node()
    if source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    return bool(source.get_friendly_name() == constant.get_friendly_name())


_NEEDS = ("nncf", "openvino", "onnx", "onnxscript")
PEERS = {
    "NNCF performance": Peer(_NEEDS, partial(quantized, preset="PERFORMANCE"), "symmetric activations"),
    "NNCF mixed": Peer(_NEEDS, partial(quantized, preset="MIXED"), "activations with a zero point"),
    "NNCF transformer": Peer(
        _NEEDS,
        partial(quantized, preset="MIXED", model_type="TRANSFORMER"),
        "mixed, model_type TRANSFORMER",
        networks=TRANSFORMERS,
    ),
}
