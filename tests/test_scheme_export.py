"""Uniform schemes of every kind go to ONNX and compute the same there; the others are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.deploy import export_onnx, run_onnx
from torchquant.errors import ExportError

pytest.importorskip("onnxruntime")


def trained(weight: str, acts: str) -> tuple[nn.Sequential, torch.Tensor]:
    """A small network after a few steps of training, in QUANT_EVAL; its images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        tq.QWrapper(
            [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()],
            tq.make_quantizer(weight),
            tq.make_quantizer(acts, "output"),
            "rescale",
            input_quantizer=tq.make_quantizer("affine:8", "input"),
        ),
        nn.Flatten(),
        tq.QWrapper(nn.Linear(96, 5), tq.make_quantizer(weight), tq.make_quantizer("affine:8", "output")),
    )
    x = torch.randn(32, 1, 6, 6)
    tq.set_qmodule_state(model, tq.QModuleState.CALIBRATION)
    model(x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), torch.arange(32) % 5).backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, tq.quantizers.LSQPlusQuantizer):
            module.snap()
    tq.observe_weights(model)
    tq.set_qmodule_state(model.eval(), tq.QModuleState.QUANT_EVAL)
    return model, x


@pytest.mark.parametrize(
    ("weight", "acts"),
    [
        ("lsq:4/channel", "lsq:4"),
        ("lsqplus:4/channel", "lsqplus:4"),
        ("ewgs:3", "ewgs:3"),
        ("tqt:4", "tqt:8"),
        ("affine:4,symmetric=narrow/channel", "pact:4"),
        ("affine:8,symmetric=narrow,observer=mse/channel", "affine:8,observer=entropy"),
        ("affine:8,symmetric=torch", "affine:8,observer=percentile"),
    ],
)
def test_what_is_uniform_computes_the_same_in_onnx_runtime(weight: str, acts: str, tmp_path: Path) -> None:
    model, x = trained(weight, acts)
    path = export_onnx(model, tmp_path / "net.onnx", x[:1])
    with torch.no_grad():
        expected = model(x)
    step = model[2].acts_quantizer.affine_params().delta
    off = (run_onnx(path, x) - expected).abs() / step
    assert float(off.max()) <= 1.01
    assert float((off > 0.01).float().mean()) <= 0.05


@pytest.mark.parametrize(
    "weight", ["apot:4", "codebook:3", "residual:3", "mxfp4", "nvfp4", "nf4", "ttq", "dorefa:4", "fp8_e4m3", "xnor"]
)
def test_what_is_not_uniform_is_refused_by_name(weight: str, tmp_path: Path) -> None:
    model, x = trained(weight, "affine:8")
    with pytest.raises(ExportError, match=r"0: the weight.*has no step and zero point|weight.*has no step"):
        export_onnx(model, tmp_path / "net.onnx", x[:1])
    assert not list(tmp_path.iterdir())
