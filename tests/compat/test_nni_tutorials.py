"""NNI's tutorials and examples on quantization, on real digits: quick start, speed-up, one example a quantizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torchquant.compat.nni.algorithms.compression.pytorch.quantization import QAT_Quantizer
from torchquant.compat.nni.compression.quantization import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)
from torchquant.compat.nni.compression.quantization_speedup import ModelSpeedupTensorRT
from torchquant.compat.nni.compression.quantization_speedup.calibrator import Calibrator
from torchquant.compat.nni.compression.utils import TorchEvaluator

from tests.compat.nni_nets import Mnist, digits, evaluating_model, training_model, training_step
from torchquant.compat import nni
from torchquant.errors import ConfigError

LAYERS = ["conv1", "conv2", "fc1", "fc2"]
RELUS = ["relu1", "relu2", "relu3"]
INT8 = {"quant_dtype": "int8", "quant_scheme": "affine", "granularity": "default"}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Mnist()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    training_model(model, optimizer, training_step, None, 300, 15)
    assert evaluating_model(model) > 0.85
    return model


def test_quick_start(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    optimizer = nni.trace(SGD)(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    evaluator = TorchEvaluator(training_model, optimizer, training_step)
    config_list = [
        {"op_names": LAYERS, "target_names": ["_input_", "weight", "_output_"], **INT8},
        {"op_names": RELUS, "target_names": ["_output_"], **INT8},
    ]
    quantizer = QATQuantizer(model, config_list, evaluator, 20)
    quantizer.track_forward(digits()[0][:64])
    _, calibration_config = quantizer.compress(None, max_epochs=3)
    assert sorted(calibration_config) == sorted([*LAYERS, *RELUS])
    assert set(calibration_config["conv1"]) == {"_input_0", "weight", "_output_0"}
    assert calibration_config["relu1"]["_output_0"]["tracked_min"] >= 0
    assert evaluating_model(model) > evaluating_model(trained) - 0.02


def test_quick_start_of_2_x(trained: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(trained)
    config_list = [
        {"quant_types": ["input", "weight"], "quant_bits": {"input": 8, "weight": 8}, "op_names": LAYERS[:2]},
        {"quant_types": ["output"], "quant_bits": {"output": 8}, "op_names": RELUS[:2]},
        {"quant_types": ["input", "weight"], "quant_bits": {"input": 8, "weight": 8}, "op_names": LAYERS[2:]},
    ]
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    quantizer = QAT_Quantizer(model, config_list, optimizer, digits()[0][:1])
    quantizer.compress()
    training_model(model, optimizer, training_step, None, 60, 3)
    assert evaluating_model(model) > evaluating_model(trained) - 0.02
    found = quantizer.export_model(tmp_path / "model.pth", tmp_path / "calibration.pth")
    assert {"weight_bits", "weight_scale", "tracked_max_input"} <= set(found["conv1"])


def test_example_qat(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    fused = {"fuse_names": [("conv1", "batchnorm1")]}
    config_list = [
        {"op_names": ["conv1"], "target_names": ["_input_", "weight", "_output_"], **INT8, **fused},
        {"op_names": ["conv2", "fc1", "fc2"], "target_names": ["_input_", "weight"], **INT8},
        {"op_names": ["relu2", "max_pool2"], "target_names": ["_output_"], **INT8},
    ]
    evaluator = TorchEvaluator(training_model, SGD(model.parameters(), lr=0.01, momentum=0.5), training_step)
    model, config = QATQuantizer(model, config_list, evaluator).compress(40, None)
    assert set(config["max_pool2"]) == {"_output_0"}
    assert evaluating_model(model) > evaluating_model(trained) - 0.03


def test_example_lsq(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    config_list = [
        {"op_names": ["conv2"], "target_names": ["_input_", "weight"], **INT8},
        {"op_names": ["relu1", "relu2"], "target_names": ["_output_"], **INT8},
        {"op_names": ["max_pool2"], "target_names": ["_output_"], **INT8},
        {
            **{"op_names": ["conv1"], "target_names": ["_input_", "weight", "_output_"], **INT8},
            "fuse_names": [("conv1", "batchnorm1")],
        },
    ]
    evaluator = TorchEvaluator(training_model, nni.trace(SGD)(model.parameters(), momentum=0.5, lr=1e-2), training_step)
    quantizer = LsqQuantizer(model, config_list, evaluator)
    listed = {(path, name) for path, targets in quantizer._target_spaces.items() for name in targets}
    assert ("conv2", "weight") in listed
    assert sorted(quantizer._module_wrappers) == sorted(["conv1", "conv2", "relu1", "relu2", "max_pool2"])
    model, config = quantizer.compress(None, 2)
    assert evaluating_model(model) > evaluating_model(trained) - 0.02
    assert float(config["conv2"]["weight"]["scale"]) > 0


def test_example_ptq(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    config_list = [
        {"op_names": LAYERS, "target_names": ["_input_", "weight", "_output_"], **INT8},
        {"op_names": RELUS, "target_names": ["_output_"], **INT8},
    ]
    optimizer = nni.trace(SGD)(model.parameters(), lr=1e-2)
    evaluator = TorchEvaluator(training_model, optimizer, training_step, evaluating_func=evaluating_model)
    model, config = PtqQuantizer(model, config_list, evaluator).compress(1, None)
    assert evaluating_model(model) > evaluating_model(trained) - 0.01
    assert sorted(config) == sorted([*LAYERS, *RELUS])


def test_example_dorefa(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    config_list = [
        {"op_names": ["conv2"], "target_names": ["_input_", "weight"], **INT8},
        {"op_names": ["relu1"], "target_names": ["_output_"], **INT8},
    ]
    evaluator = TorchEvaluator(training_model, nni.trace(SGD)(model.parameters(), lr=1e-3, momentum=0.9), training_step)
    model, config = DoReFaQuantizer(model, config_list, evaluator, gradient_bits=8).compress(None, 4)
    assert config["conv2"]["weight"]["scale"] == pytest.approx(2 / 255)
    assert (config["relu1"]["_output_0"]["tracked_min"], config["relu1"]["_output_0"]["tracked_max"]) == (0.0, 1.0)
    assert evaluating_model(model) > 0.5


class SmallVGG(nn.Module):
    """The network of the example for binarized networks, smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardtanh(inplace=True)),
            *(
                nn.Conv2d(16, 32, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(32),
                nn.Hardtanh(inplace=True),
            ),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.Hardtanh(inplace=True)),
            *(nn.Linear(64, 10), nn.BatchNorm1d(10, affine=False)),
        )

    def forward(self, x: Any) -> Any:
        return torch.log_softmax(self.classifier(self.features(x).flatten(1)), 1)


def test_example_bnn() -> None:
    torch.manual_seed(0)
    model: Any = SmallVGG()
    config_list = [
        {"op_names": ["features.3", "classifier.0"], "target_names": ["weight"], **INT8, "quant_dtype": None},
        {"op_names": ["features.6", "classifier.2"], "target_names": ["_output_"], **INT8, "quant_dtype": None},
    ]
    evaluator = TorchEvaluator(training_model, nni.trace(Adam)(model.parameters(), lr=1e-2), training_step)
    model, config = BNNQuantizer(model, config_list, evaluator).compress(None, 2)
    assert evaluating_model(model) > 0.7
    for path, name in (("features.3", "weight"), ("features.6", "_output_0")):
        assert {key: config[path][name][key] for key in ("scale", "zero_point", "quant_bits")} == {
            **{"scale": 1.0, "zero_point": 0.0, "quant_bits": 1}
        }
    assert float(model.features[3].layer.weight.detach().abs().max()) <= 1.0 + 1e-6


@pytest.mark.parametrize("fused", [(), [("conv1", "batchnorm1")]], ids=["plain", "fused"])
def test_speed_up_with_a_calibration_config(trained: nn.Module, tmp_path: Path, fused: Any) -> None:
    pytest.importorskip("onnxruntime")
    x, _ = digits(train=False)
    quantized = copy.deepcopy(trained)
    entry = {"op_names": LAYERS, "target_names": ["_input_", "weight"], **INT8, "fuse_names": fused}
    evaluator = TorchEvaluator(training_model, evaluating_func=evaluating_model)
    quantized, config = PtqQuantizer(quantized, [entry], evaluator).compress()
    engine = ModelSpeedupTensorRT(copy.deepcopy(trained), (32, 1, 8, 8), config, tmp_path / "model.onnx")
    engine.compress()
    output, seconds = engine.inference(x[:512].numpy())
    assert seconds > 0
    with torch.no_grad():
        expected = quantized(x[:512])
    assert float((output.argmax(1) == expected.argmax(1)).float().mean()) > 0.99
    assert float((output - expected).square().mean() / expected.square().mean()) < 1e-4
    engine.export_quantized_model(tmp_path / "copy.onnx")
    engine.load_quantized_model(tmp_path / "copy.onnx")
    assert torch.equal(engine.inference(x[:32])[0], output[:32])
    with pytest.raises(ConfigError, match=r"compress\(\) needs a calibration config"):
        ModelSpeedupTensorRT(trained, (1, 1, 8, 8)).compress()


def test_speed_up_with_calibration_data(trained: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    calibrator = Calibrator(digits()[0][:256].numpy(), tmp_path / "cache", batch_size=64)
    engine = ModelSpeedupTensorRT(copy.deepcopy(trained), (32, 1, 8, 8), onnx_path=tmp_path / "model.onnx")
    engine.compress_with_calibrator(calibrator)
    x, y = digits(train=False)
    output, _ = engine.inference(x)
    assert float((output.argmax(1) == y).float().mean()) > evaluating_model(trained) - 0.02
