"""A model is lowered once, and the result serves export, integers and the certificate."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.deploy import Lowered, certify, export_onnx, lower, to_integer
from torchquant.deploy.lowering import deploy_form as form
from torchquant.errors import ConfigError, ExportError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model = tq.quantize(layers, "int8-ort", X).eval()
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(X)
    return model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a deploy form is made, and with fixed bias scales, from here on."""
    counted: Counter[str] = Counter()
    for name in ("deploy_form", "fix_bias_scales"):
        plain = getattr(form, name)

        def call(*args: Any, _name: str = name, _plain: Any = plain, **options: Any) -> Any:
            counted[_name] += 1
            return _plain(*args, **options)

        monkeypatch.setattr("torchquant.deploy.lowering.lowered." + name, call)
    return counted


def test_an_export_lowers_once(model: nn.Module, steps: Counter[str], tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "model.onnx", X[:2])
    assert steps == {"deploy_form": 1, "fix_bias_scales": 1}


def test_one_lowered_serves_all(model: nn.Module, steps: Counter[str], tmp_path: Path) -> None:
    lowered = lower(model, X[:2], keep_signed=True)
    path = export_onnx(lowered, tmp_path / "model.onnx")
    certificate = certify(lowered, path, X)
    integer = to_integer(lowered)
    assert steps == {"deploy_form": 1, "fix_bias_scales": 1}
    assert certificate.passed
    alone = export_onnx(model, tmp_path / "alone.onnx", X[:2], keep_signed=True)
    assert path.read_bytes() == alone.read_bytes()
    assert certify(model, alone, X).to_dict() == certificate.to_dict()
    other = to_integer(model, X[:2], keep_signed=True, as_exported=True)
    assert torch.equal(integer(X), other(X))
    assert (integer.accumulators, integer.float_operators) == (other.accumulators, other.float_operators)


def test_it_is_frozen_and_holds_its_model(model: nn.Module) -> None:
    lowered = lower(model, X)
    assert (lowered.model, lowered.not_run) == (model, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        lowered.keep_signed = True  # type: ignore[misc]


def test_what_was_lowered_otherwise_is_refused(model: nn.Module, tmp_path: Path) -> None:
    lowered = lower(model, X)
    with pytest.raises(ConfigError, match="leave example_inputs out"):
        export_onnx(lowered, tmp_path / "model.onnx", X)
    with pytest.raises(ConfigError, match="keep_signed=True, but the model was lowered without"):
        export_onnx(lowered, tmp_path / "model.onnx", keep_signed=True)
    with pytest.raises(ConfigError, match="as_exported=False, which no file can hold"):
        export_onnx(lower(model, X, as_exported=False), tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="to lower a model, give example_inputs"):
        to_integer(model)
    path = export_onnx(lowered, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="was written with keep_signed=False, but the model was lowered otherwise"):
        certify(lower(model, X, keep_signed=True), path, X)
    assert isinstance(lowered, Lowered)
