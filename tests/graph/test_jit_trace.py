"""`torch.jit.trace` follows a forward that quantizes, with gradients on and off."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import torchquant as tq


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("spec", ["affine:8", "affine:8,gradient_clip", "pot:4", "binary"])
def test_a_trace_computes_what_the_model_does(spec, with_gradients):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(4, 3, 8, 8)
    model = tq.quantize(net, [{"weight": spec, "input": "affine:8", "output": "affine:8"}], x)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    with torch.set_grad_enabled(with_gradients):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the function deprecated, and constants constant
            traced = torch.jit.trace(model, x)
        assert traced.save_to_buffer()
        assert torch.equal(traced(2.0 * x), model(2.0 * x))
