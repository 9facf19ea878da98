"""A class with several weights becomes one that quantizes by one call of `register_pattern`: plans, files, integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.deploy import certify, export_onnx, load_packed, save_packed, to_integer
from torchquant.errors import ConfigError, NameClashError
from torchquant.qmodule import LayerPattern, QWeights, WeightsPattern, patterns, weighted
from torchquant.qmodule import weight_slots as slots_of_weights
from torchquant.qmodule.weights import weight_names
from torchquant.utils import weight_slots

RULES = [{"weight": "affine:8,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"}]


class Cell(nn.Module):
    """A recurrent cell of nobody's package."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.kept = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.read) + F.linear(state, self.kept, self.shift))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = Cell(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x[:, 0]
        for i in range(1, 3):
            state = self.cell(x[:, i], state)
        return self.head(state)


@pytest.fixture(autouse=True)
def own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a test adds go when it ends."""
    for module, name in ((patterns, "PATTERNS"), (weighted, "WEIGHTED")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    for module in (patterns, slots_of_weights):
        monkeypatch.setattr(module, "WEIGHTED", weighted.WEIGHTED)


def calibrated_steps() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = Steps().eval(), torch.randn(6, 3, 4)
    tq.register_pattern(Cell, WeightsPattern(("read", "kept"), values=("x",)))
    model = tq.quantize(net, RULES, x)
    assert torch.equal(model(x), net(x))
    tq.calibrate(model, [x])
    tq.set_qmodule_state(model.eval(), tq.QModuleState.QUANT_EVAL)
    assert not torch.equal(model(x), net(x))
    return model, x


def test_a_class_with_several_weights_is_one_call(tmp_path: Path) -> None:
    assert "cell" in str(tq.quantize(Steps(), RULES, torch.randn(6, 3, 4)).plan).partition("left float")[2]
    model, x = calibrated_steps()
    assert isinstance(model.cell, QWeights)
    plan = model.plan
    assert isinstance(plan, tq.QuantPlan)
    assert plan.coverage is not None
    assert plan.coverage.macs == plan.coverage.quantized_macs == 2 * 2 * 16 + 12
    assert [slot.key for slot in weight_slots(model)] == ["cell.read", "cell.kept", "head.weight"]
    assert torch.equal(load_packed(save_packed(model, tmp_path / "m.safetensors"), model)(x), model(x))
    integer = to_integer(model, x)
    assert [found.name for found in integer.float_operators] == ["Cell"]
    torch.testing.assert_close(integer(x), model(x), rtol=0.0, atol=0.05)


@pytest.mark.slow
def test_its_file_computes_the_same(tmp_path: Path) -> None:
    model, x = calibrated_steps()
    certificate = certify(model, export_onnx(model, tmp_path / "m.onnx", x), x)
    assert certificate.passed, str(certificate)


def test_what_a_pattern_says_is_checked() -> None:
    with pytest.raises(ConfigError, match="first arguments of Cell.forward, which has x, state; got input"):
        tq.register_pattern(Cell, WeightsPattern(("read",)))
    tq.register_pattern(Cell, WeightsPattern(("read", "keep"), values=("x",)))
    with pytest.raises(ConfigError, match="of Cell lists the weight 'keep'; its parameters are read, kept, shift"):
        weight_names(Cell())
    with pytest.raises(NameClashError, match="already has the row WeightsPattern"):
        tq.register_pattern(Cell, LayerPattern())
    with pytest.raises(NameClashError, match="already has the row LayerPattern"):
        tq.register_pattern(nn.Linear, WeightsPattern())
    assert weight_names(nn.Linear(1, 1)) == []


@torch.no_grad()
def test_it_compiles_in_one_graph() -> None:
    model, x = calibrated_steps()
    cell = model.cell
    assert torch.equal(torch.compile(cell, fullgraph=True, backend="eager")(x[:, 0], x[:, 1]), cell(x[:, 0], x[:, 1]))


def test_a_table_of_numbers_reads_no_values() -> None:
    table = QWeights(nn.Embedding(3, 2), {}, input_quantizer=tq.make_quantizer("affine:8", "input"))
    with tq.qmodule_state(table, tq.QModuleState.CALIBRATION):
        assert torch.equal(table(torch.tensor([2])), table.layer(torch.tensor([2])))
