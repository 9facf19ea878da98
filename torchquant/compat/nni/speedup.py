"""NNI's speed-up of a quantized model: a calibration config becomes an ONNX file, and ONNX Runtime runs it."""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._shown import shown
from torchquant.compat.nni.quantizers import PtqQuantizer
from torchquant.deploy import export_onnx, run_onnx
from torchquant.errors import ConfigError
from torchquant.graph import capture
from torchquant.plan import quantize
from torchquant.qmodule import QModuleState, QWrapper
from torchquant.training import calibrate
from torchquant.utils import set_qmodule_state


class Calibrator:
    """Inputs to calibrate on. data: (N, ...), an array or tensor, read in batches. No cache file is written."""

    def __init__(self, training_data: Any, cache_file: Any = None, batch_size: int = 64, algorithm: Any = None) -> None:
        self.data, self.batch_size = torch.as_tensor(training_data), batch_size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.data.split(self.batch_size))


class ModelSpeedupTensorRT:
    """Deploys a float model as integers; ONNX Runtime on the CPU takes TensorRT's place.

    `input_shape`: of one input, with its batch size. `config`: the calibration config of a quantizer, for `compress`.
    A batch norm is folded where the scale of the weight in the config is that of the folded weight. Raises
    ConfigError, ExportError, MissingDependencyError.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        config: Mapping[str, Mapping[str, Any]] | None = None,
        onnx_path: str | os.PathLike[str] = "default_model.onnx",
    ) -> None:
        self.model, self.input_shape, self.config, self.onnx_path = model, tuple(input_shape), config, Path(onnx_path)

    def compress(self) -> None:
        """Write the model with the numbers of the calibration config."""
        if not self.config:
            raise ConfigError("compress() needs a calibration config; compress_with_calibrator(calibrator) needs none")
        self._export(restored(self.model, self.config))

    def compress_with_calibrator(self, calib: Calibrator) -> None:
        """Write the model with 8 bits for weights and activations, calibrated on the inputs of the calibrator."""
        model = quantize(copy.deepcopy(self.model).cpu().eval(), "w8a8", inplace=True)
        calibrate(model, calib, show_progress=False)
        set_qmodule_state(model, QModuleState.QUANT_EVAL)
        self._export(model)

    def _export(self, model: nn.Module) -> None:
        export_onnx(model, self.onnx_path, torch.zeros(self.input_shape))

    def inference(self, test_data: Any, reset_context: bool = False) -> tuple[Tensor, float]:
        """Return the output, (N, ...), and the seconds it took. test_data: (N, ...), an array or tensor."""
        x = torch.as_tensor(test_data)
        started = time.perf_counter()
        return run_onnx(self.onnx_path, x, optimize=True), time.perf_counter() - started

    def export_quantized_model(self, path: str | os.PathLike[str]) -> None:
        """Copy the ONNX file to a path."""
        shutil.copyfile(self.onnx_path, path)

    def load_quantized_model(self, path: str | os.PathLike[str]) -> None:
        """Run this ONNX file from now on."""
        self.onnx_path = Path(path)


def restored(model: nn.Module, config: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Return a copy of a float model, quantized with the numbers of a calibration config of 2.x or 3.0."""
    model = copy.deepcopy(model).cpu().eval()
    entries = [_entry(path, dict(entry)) for path, entry in config.items()]
    entries[0]["fuse_names"] = _folded(model, config)
    quantizer = PtqQuantizer(model, entries)
    quantizer.load_calibration_config(config)
    bound = quantizer.release_hooks()
    set_qmodule_state(bound, QModuleState.QUANT_EVAL)
    return bound


def _folded(model: nn.Module, config: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the layers and batch norms whose scales in the config are those of folded weights."""
    found = []
    for site in capture(model, trace="modules", fuse="bn").sites:
        entry = config.get(site.path, {})
        scale = entry.get("weight_scale", entry.get("weight", {}).get("scale") if "weight" in entry else None)
        if scale is None or site.batch_norm is None:
            continue
        layer: Any = site.module
        wrapper = QWrapper([layer, model.get_submodule(site.batch_norm[0])], fold_bn="running")
        n_steps = 2.0 ** (entry.get("weight_bits") or entry["weight"]["quant_bits"]) - 1
        largest = float(torch.as_tensor(scale).max()) * n_steps / 2
        plain, folded = (float(weight.detach().abs().max()) for weight in (layer.weight, wrapper.float_weight()))
        if abs(math.log(folded / largest)) < abs(math.log(plain / largest)):
            found.append((site.path, site.batch_norm[0]))
    return found


def _entry(path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a config list that asks for the quantizers of one module."""
    if all(isinstance(value, Mapping) for value in entry.values()):
        return {"op_names": [path], "target_settings": {name: _setting(name, entry[name]) for name in entry}}
    bits = {name.removesuffix("_bits"): value for name, value in entry.items() if name.endswith("_bits")}
    if not bits:
        raise ConfigError(f"the calibration config has no bits for '{path}', got {shown(entry)}")
    names = {"input": "_input_", "output": "_output_"}
    usual = {"weight": "symmetric", "bias": "symmetric"}
    return {
        "op_names": [path],
        "target_settings": {
            names.get(name, name): {"quant_dtype": f"int{n}", "quant_scheme": usual.get(name, "affine")}
            for name, n in bits.items()
        },
    }


def _setting(name: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    scale = torch.as_tensor(numbers.get("scale", 0.0))
    low, high = torch.as_tensor(numbers["tracked_min"]), torch.as_tensor(numbers["tracked_max"])
    n_steps = (high.clamp_min(0) - low.clamp_max(0)) / scale if "scale" in numbers else torch.zeros(1)
    is_full = round(float(n_steps.max())) == 2 ** numbers["quant_bits"] - 1
    by_channel = "per_channel" if name.startswith("_") else "out_channel"
    return {
        "quant_dtype": f"uint{numbers['quant_bits']}" if is_full else numbers["quant_dtype"],
        "quant_scheme": "affine" if is_full else numbers["quant_scheme"],
        "granularity": by_channel if scale.numel() > 1 else "default",
    }
