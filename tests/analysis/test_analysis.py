"""SQNR, layer errors and weight bytes against numbers computed by hand."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from torch import Tensor, nn

from torchquant import (
    AffineQuantizer,
    BatchMinMax,
    ESBQuantizer,
    ExpAvgMinMax,
    QfmtQuantizer,
    QModuleState,
    QOp,
    QWrapper,
    TernaryQuantizer,
    qmodule_state,
    quantize,
)
from torchquant.analysis import layer_errors, sqnr, weight_bytes
from torchquant.errors import ConfigError, UnobservedRangeError


class TwoLayers(nn.Module):
    """A convolution with batch norm, an addition to itself, a linear layer that stays float."""

    def __init__(self) -> None:
        super().__init__()
        weight = AffineQuantizer(4, BatchMinMax(axis=0), symmetric="narrow")
        layers = [nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU()]
        self.conv = QWrapper(layers, weight, AffineQuantizer(4, ExpAvgMinMax()), fold_bn="rescale")
        self.add = QOp(operator.add, AffineQuantizer(3, ExpAvgMinMax()))
        self.fc = QWrapper(nn.Linear(3, 2), None, None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.fc(self.add(y, y).mean((2, 3)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(x: Tensor) -> TwoLayers:
    torch.manual_seed(0)
    model = TwoLayers()
    model(x)  # running statistics
    with qmodule_state(model.eval(), QModuleState.CALIBRATION):
        model(x)
    return model


def test_sqnr_by_hand() -> None:
    assert sqnr(torch.tensor([10.0]), torch.tensor([9.0])) == pytest.approx(20.0)
    assert sqnr(torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([0.0, -1.0, 1.0, 1.0])) == pytest.approx(
        6.0206, abs=1e-4
    )


def test_sqnr_is_computed_in_double() -> None:
    x = torch.full((1000,), 200.0, dtype=torch.float16)
    assert sqnr(x, x - 2) == pytest.approx(40.0)


def test_sqnr_without_signal_or_noise() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert sqnr(ones, ones) == math.inf
    assert sqnr(zeros, zeros) == math.inf
    assert sqnr(zeros, ones) == -math.inf
    assert math.isnan(sqnr(ones, ones * math.nan))
    assert math.isnan(sqnr(ones * math.nan, ones))


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((0,), (0,))])
def test_sqnr_refuses_what_has_no_answer(shapes: tuple[tuple[int], tuple[int]]) -> None:
    with pytest.raises(ConfigError, match="one shape with at least one element"):
        sqnr(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_layer_errors_equal_a_run_by_hand(model: TwoLayers, x: Tensor) -> None:
    errors = {error.path: error for error in layer_errors(model, x)}
    assert list(errors) == ["conv", "add", "fc"]
    conv = model.conv
    weight = conv.layer.weight * (conv.bn.weight / torch.sqrt(conv.bn.running_var + conv.bn.eps)).view(-1, 1, 1, 1)
    assert errors["conv"].weight.sqnr_db == pytest.approx(sqnr(weight, conv.weight_quantizer(weight)))
    with torch.no_grad():
        real = conv(x)
        with qmodule_state(model, QModuleState.QUANT_EVAL):
            quantized = conv(x)
            quantized_sum = model.add(quantized, quantized)
    assert errors["conv"].output.sqnr_db == pytest.approx(sqnr(real, quantized))
    assert errors["add"].output.sqnr_db == pytest.approx(sqnr(real + real, quantized_sum))
    assert errors["add"].weight is None
    assert (errors["fc"].weight, errors["fc"].output) == (None, None)
    assert (errors["conv"].weight.n_bits, errors["add"].output.n_bits) == (4, 3)


def test_layer_errors_of_a_quantized_input_of_a_sequential() -> None:
    """Its forward goes through all its children, where it runs no graph."""
    x = torch.linspace(-1.0, 1.0, 32).reshape(8, 4)
    model = quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "int8-ort", x)
    with qmodule_state(model, QModuleState.CALIBRATION):
        model(x)
    found = {error.path: error.output for error in layer_errors(model, x)}
    assert torch.equal(found["quantize_input_1"].real.reshape(8, 4), x)


def test_layer_errors_samples_are_bounded_and_aligned(model: TwoLayers, x: Tensor) -> None:
    (conv, *_), (again, *_) = layer_errors(model, x, n_samples=50), layer_errors(model, x, n_samples=50)
    assert conv.weight.real.shape == conv.weight.quantized.shape == (27,)
    assert conv.output.real.shape == conv.output.quantized.shape == (50,)
    assert torch.equal(conv.output.real, again.output.real)
    step = float(model.conv.acts_quantizer.affine_params().delta)
    assert (conv.output.real - conv.output.quantized).abs().mean() < 2 * step
    assert conv.output.quantized.unique().numel() <= 16


def test_layer_errors_leaves_no_trace(model: TwoLayers, x: Tensor) -> None:
    model.train()
    model.fc.eval()
    model.add.state = QModuleState.QUANT_EVAL_ACT_ONLY
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer_errors(model, x)
    assert [m.training for m in (model, model.conv, model.conv.bn, model.fc)] == [True, True, True, False]
    assert [m.state.name for m in (model.conv, model.add)] == ["BYPASSED", "QUANT_EVAL_ACT_ONLY"]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layer_errors_before_calibration_cleans_up(x: Tensor) -> None:
    model = TwoLayers()
    with pytest.raises(UnobservedRangeError, match="conv"):
        layer_errors(model, x)
    assert model.training
    assert model.conv.state is QModuleState.BYPASSED
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_errors_of_a_single_qmodule_called_twice() -> None:
    op = QOp(torch.relu, AffineQuantizer(2, BatchMinMax()))
    op.acts_quantizer.observer.force_ranges(0.0, 3.0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = op

        def forward(self, x: Tensor) -> Tensor:
            return self.op(self.op(x) + 10)

    (error,) = layer_errors(Twice(), torch.tensor([2.4, 1.0]))
    assert error.output.real.tolist() == pytest.approx([2.4, 1.0])
    assert error.output.quantized.tolist() == [2.0, 1.0]
    (root,) = layer_errors(op, torch.tensor([1.0, 2.0]))
    assert (root.path, root.output.sqnr_db) == ("(root)", math.inf)
    assert root.to_dict()["output"] == {"scheme": "AffineQuantizer", "n_bits": 2, "sqnr_db": None}


@pytest.mark.parametrize(
    ("quantizer", "codes", "parameters"),
    [
        (AffineQuantizer(8, BatchMinMax(axis=0), symmetric="narrow"), 21, 3 * 4),
        (AffineQuantizer(3, BatchMinMax()), 8, 4 + 1),  # 63 bits; a zero point
        (AffineQuantizer(12, BatchMinMax(axis=0)), 32, 3 * (4 + 2)),
        (QfmtQuantizer(4, True, BatchMinMax(axis=0)), 11, 3 * 4),
        (ESBQuantizer(4, 1, axis=0), 11, 3 * 4),
        (ESBQuantizer(4, 1), 11, 4),
        (TernaryQuantizer(axis=0), 6, 3 * 4),  # alpha; the threshold is not needed to decode
    ],
    ids=lambda value: f"{type(value).__name__}{value.n_bits}" if isinstance(value, nn.Module) else None,
)
def test_weight_bytes_by_hand(quantizer: nn.Module, codes: int, parameters: int) -> None:
    torch.manual_seed(0)
    wrapper = QWrapper(nn.Linear(7, 3), quantizer, None)
    wrapper.observe_weight()
    (site,) = weight_bytes(wrapper)
    assert (site.codes, site.parameters, site.total) == (codes, parameters, codes + parameters)
    assert site.to_dict() == {"path": "(root)", "n_bits": quantizer.n_bits, "codes": codes, "parameters": parameters}


def test_weight_bytes_of_float_layers() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), QWrapper(nn.Linear(5, 2), None, None))
    assert [(site.path, site.n_bits, site.total) for site in weight_bytes(model)] == [("0", 32, 216), ("2", 32, 40)]


def test_weight_bytes_before_calibration() -> None:
    with pytest.raises(UnobservedRangeError):
        weight_bytes(TwoLayers())
