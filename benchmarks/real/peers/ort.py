"""ONNX Runtime's own tools: static (QDQ, activations uint8, weights int8 per channel) and dynamic quantization."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.real.networks import Real
from benchmarks.real.peers._base import Peer, Quantized
from benchmarks.real.peers.onnx_files import Feeds, float_file, integer_weights, prepared_file, session_call
from torchquant.errors import require


def static_file(network: Real, folder: Path, method: str) -> Path:
    """The file that `quantize_static` makes, written once."""
    path = folder / f"ort-{method}.onnx"
    if not path.exists():
        tool, source = require("onnxruntime.quantization", "deploy"), prepared_file(network, folder)
        tool.quantize_static(
            str(source),
            str(path),
            Feeds(source, network.calibration),
            quant_format=tool.QuantFormat.QDQ,
            activation_type=tool.QuantType.QUInt8,
            weight_type=tool.QuantType.QInt8,
            per_channel=True,
            calibrate_method=getattr(tool.CalibrationMethod, method),
        )
    return path


def static(network: Real, folder: Path, method: str) -> Quantized:
    path = static_file(network, folder, method)
    return Quantized(session_call(path), integer_weights(path))


def dynamic(network: Real, folder: Path) -> Quantized:
    path = folder / "ort-dynamic.onnx"
    tool = require("onnxruntime.quantization", "deploy")
    tool.quantize_dynamic(str(prepared_file(network, folder)), str(path), per_channel=True)
    return Quantized(session_call(path), integer_weights(path))


def nbits(network: Real, folder: Path, group: int, algorithm: str = "rtn") -> Quantized:
    """4-bit weights of matrix products, a scale for each `group` weights of an output, or each output (0).

    `algorithm`: "rtn", "hqq", "gptq".
    """
    tool = require("onnxruntime.quantization.matmul_nbits_quantizer", "deploy")
    onnx, source = require("onnx", "deploy"), float_file(network, folder)
    size, kind = group or 32, getattr(tool.QuantFormat, "QOperator" if group else "QDQ")
    chosen = {
        "rtn": lambda: tool.DefaultWeightOnlyQuantConfig(
            size, is_symmetric=True, channel_wised_quantize=not group, quant_format=kind
        ),
        "hqq": lambda: tool.HQQWeightOnlyQuantConfig(size),
        "gptq": lambda: tool.GPTQWeightOnlyQuantConfig(_Feeds(source, network.calibration), block_size=size),
    }[algorithm]()
    made = tool.MatMulNBitsQuantizer(onnx.load(source), 4, size, is_symmetric=True, algo_config=chosen)
    made.process()
    path = folder / f"ort-nbits-{group}-{algorithm}.onnx"
    onnx.save(made.model.model, path)
    sizes = [{a.name: a.i for a in node.attribute} for node in made.model.model.graph.node if "NBits" in node.op_type]
    return Quantized(session_call(path), [size["K"] * size["N"] for size in sizes] or integer_weights(path))


class _Feeds(Feeds):
    """Feeds that can be walked through, as its GPTQ does."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.feeds


_NEEDS = ("onnx", "onnxscript", "onnxruntime")
METHODS = {"MinMax": "min-max", "Entropy": "entropy", "Percentile": "percentile"}
PEERS = {
    f"ORT {name}": Peer(_NEEDS, partial(static, method=method), f"quantize_static, per channel, calibrated by {name}")
    for method, name in METHODS.items()
} | {"ORT dynamic": Peer(_NEEDS, dynamic, "quantize_dynamic, per channel: ranges of each call", is_dynamic=True)}
