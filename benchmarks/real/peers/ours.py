"""The ready rule sets of torchquant: simulated, and as a file that ONNX Runtime runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.real.networks import Batches, Real
from benchmarks.real.peers._base import TRANSFORMERS, Peer, Quantized
from benchmarks.real.peers.onnx_files import integer_weights, session_call
from torchquant import calibrate, quantize
from torchquant.deploy import export_onnx
from torchquant.plan.rules import Rules
from torchquant.utils import weight_slots


def calibrated(network: Real, rules: Rules, batches: Batches | None = None) -> nn.Module:
    """The network by the rules, calibrated and in QUANT_EVAL."""
    model = quantize(network.model, rules, network.calibration[0])
    calibrate(model, network.calibration if batches is None else batches, with_targets=False, show_progress=False)
    return model


def quantized_weights(model: nn.Module) -> list[int]:
    """How many numbers each weight holds that passes a quantizer."""
    found: dict[Any, int] = {}
    for slot in weight_slots(model):
        if slot.quantizer is not None:
            key = (slot.module, slot.name) if slot.is_computed else slot.weight  # a tied one counts once
            found[key] = slot.weight.numel()
    return list(found.values())


def simulated(network: Real, folder: Path, rules: str) -> Quantized:
    model = calibrated(network, rules)
    return Quantized(model, quantized_weights(model))


def file_of(network: Real, folder: Path, rules: str) -> Path:
    """The file of a rule set, written once."""
    path = folder / f"torchquant-{rules}.onnx"
    if not path.exists():
        model = calibrated(network, rules)
        export_onnx(model, path, network.calibration[0], dynamic_batch=False, verify=False)
    return path


def in_ort(network: Real, folder: Path, rules: str) -> Quantized:
    path = file_of(network, folder, rules)
    return Quantized(session_call(path), integer_weights(path))


SETS: dict[str, tuple[str, ...]] = {
    name: TRANSFORMERS if name.endswith("-transformer") else ()
    for name in ("w8a8", "w8a8-products", "w8a8-transformer", "w4a8", "w4a8-transformer")
}
"""Rule set -> the networks that it is for, () for all."""
FILES = ("int8-ort",)
PEERS = {
    **{
        name: Peer((), partial(simulated, rules=name), "rule set, simulated in torch", networks=networks)
        for name, networks in SETS.items()
        if name.startswith("w8a8")
    },
    **{
        f"{name} file": Peer(
            ("onnx", "onnxscript", "onnxruntime"),
            partial(in_ort, rules=name),
            "rule set, the ONNX file in ONNX Runtime",
        )
        for name in FILES
    },
}
