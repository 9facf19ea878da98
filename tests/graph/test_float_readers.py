"""Outputs that only float operators read have no quantizer; rules and exports of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.deploy import certify, export_onnx, export_qonnx
from torchquant.errors import ConfigError, ExportError
from torchquant.plan import RULE_SETS

TOKENS = "affine:8,symmetric=narrow/token"


class Block(nn.Module):
    """A layer of a transformer; `dense` and `down` end in residual sums before norms."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.dense = (nn.Linear(d, d) for _ in range(4))
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.up, self.down, self.drop = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, d] -> the same."""
        scores = self.q(x) @ self.k(x).transpose(-1, -2) * 0.25
        x = self.n1(x + self.drop(self.dense(scores.softmax(-1) @ self.v(x))))
        return self.n2(x + self.drop(self.down(F.gelu(self.up(x)))))


class Unfollowed(nn.Module):
    """Its forward asks for the values of a tensor, so that no graph has it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.first, self.second, self.norm = Block(), nn.Linear(16, 16), nn.Linear(16, 4), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, 16] -> [n, tokens, 4]."""
        x = self.block(x)
        if bool(x.sum() > 1e9):
            x = -x
        result: Tensor = self.second(self.norm(x + self.first(x)))
        return result


def outputs(model: nn.Module) -> dict[str, bool]:
    return {site.path: site.output is not None for site in model.plan.sites}  # type: ignore[union-attr]


def calibrated(net: nn.Module, rules: object, x: Tensor) -> nn.Module:
    model = tq.quantize(net.eval(), rules, x)  # type: ignore[arg-type]
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    return model


def sqnr(reference: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()).detach())


def test_a_layer_before_a_residual_sum_and_a_norm_stays_float_there() -> None:
    found = outputs(tq.quantize(nn.Sequential(Block(), nn.Linear(16, 3)).eval(), "w8a8", torch.randn(2, 5, 16)))
    assert not found["0.dense"]
    assert not found["0.down"]
    assert found["0.q"]  # a matrix product reads it
    assert found["0.up"]
    assert found["1"]  # the caller reads it


def test_the_plan_tells_and_a_rule_that_names_the_layer_means_it() -> None:
    net, x = nn.Sequential(Block()).eval(), torch.randn(2, 5, 16)
    plan = tq.quantize(net, "w8a8", x).plan
    assert any(left.path == "0.down" and "its output only" in left.why for left in plan.floats)  # type: ignore[union-attr]
    every = {"weight": "affine:8", "output": "affine:8"}
    assert outputs(tq.quantize(net, [every, {"names": "0.down", "output": "affine:8"}], x))["0.down"]
    assert outputs(tq.quantize(net, [{**every, "unread": True}], x))["0.down"]
    assert not outputs(tq.quantize(net, [{"types": "Linear", **every}], x))["0.down"]
    with pytest.raises(ConfigError, match="unread must be True or False"):
        tq.quantize(net, [{**every, "unread": "yes"}], x)


def test_a_wide_residual_sum_costs_no_accuracy() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Block(), Block()).eval(), torch.randn(16, 8, 16)
    with torch.no_grad():
        for block in net:
            block.down.bias[3] = 60.0  # type: ignore[union-attr, index]
    reference = net(x)
    found = sqnr(reference, calibrated(net, "w8a8", x)(x))
    named = calibrated(net, [{**RULE_SETS["w8a8"][0], "unread": True}], x)
    assert found > sqnr(reference, named(x)) + 6


def test_a_nested_region_asks_its_caller() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            if bool(scale.sum() > 1e9):  # looked into by itself
                return x
            result: Tensor = self.layer(x) * scale
            return result

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.norm = Part(), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(x + self.part(x, x))
            return result

    assert not outputs(tq.quantize(Whole().eval(), "w8a8", torch.randn(2, 16)))["part.layer"]


def test_without_a_graph_layers_quantize_what_they_read() -> None:
    torch.manual_seed(0)
    net, x = Unfollowed().eval(), torch.randn(4, 6, 16)
    model = calibrated(net, "w8a8", x)
    found = outputs(model)
    assert not found["first"]
    assert not found["second"]
    assert all(model.get_submodule(name).input_quantizer is not None for name in ("first", "second"))
    assert sqnr(net(x), model(x)) > 30


def test_convolutions_of_onnx_runtime_keep_theirs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    assert outputs(tq.quantize(net, "int8-ort", x))["0"]
    assert not outputs(tq.quantize(net, "w8a8", x))["0"]


def test_rules_of_transformers_need_no_names() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Block(), Block(), nn.Linear(16, 3)), torch.randn(16, 8, 16)
    model = calibrated(net, "w8a8-transformer", x)
    plans = {site.path: site for site in model.plan.sites}  # type: ignore[union-attr]
    assert plans["0.down"].input == TOKENS
    assert plans["0.matmul"].input == "affine:8"
    assert not any(site.output for site in plans.values())
    assert not any(path.endswith("add") for path in plans)
    reference = net(x)
    assert sqnr(reference, model(x)) > sqnr(reference, calibrated(net, "w8a8", x)(x)) + 2
    assert sqnr(reference, calibrated(net, "w4a8-transformer", x)(x)) > 15


def test_products_of_tokens_are_integers_in_the_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = calibrated(Block(), "w8a8-transformer", torch.randn(4, 8, 16))
    path = export_onnx(model, tmp_path / "m.onnx", torch.randn(4, 8, 16), verify=False)
    certificate = certify(model, path, torch.randn(32, 8, 16))
    assert certificate.passed, str(certificate)
    assert all(not site.missing for comparison in certificate.comparisons for site in comparison.sites)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MatMulInteger") == 6
    assert kinds.count("DequantizeLinear") == kinds.count("QuantizeLinear") == 4  # of the products in attention


def test_two_axes_narrow_weights_and_signed_codes_of_tokens(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    rules = [{"weight": "affine:8,symmetric=narrow/channel", "input": TOKENS}]
    rules += [{"names": "0", "weight": "affine:4,symmetric=narrow/channel"}]
    net = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False), nn.Tanh(), nn.Linear(4, 4))
    model = calibrated(net, rules, torch.randn(4, 16))
    path = export_onnx(model, tmp_path / "m.onnx", torch.randn(4, 16), verify=False, keep_signed=True)
    assert certify(model, path, torch.randn(64, 16)).passed
    assert [node.op_type for node in onnx.load(path).graph.node].count("MatMulInteger") == 3
    with pytest.raises(ExportError, match="no quantizers with a scale per token"):
        export_qonnx(model, tmp_path / "q.onnx", torch.randn(4, 16))


def test_a_token_has_a_scale_of_its_own() -> None:
    quantizer = tq.make_quantizer(TOKENS, "input")
    x = torch.randn(3, 5, 64) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    y = quantizer(x)
    for i in range(3):
        assert torch.equal(quantizer(x[i]), y[i])
        assert float((y[i] - x[i]).abs().max()) <= float(x[i].abs().max()) / 127 * 0.51
    assert quantizer.is_ready
    assert torch.equal(quantizer.decode(quantizer.encode(x)), y)
    for wrong, words in {
        "affine:9,symmetric=narrow/token": r"2\.\.8",
        "affine:8/token": "symmetric around 0",
        "affine:8,symmetric=narrow/token@ewgs": "symmetric around 0",
    }.items():
        with pytest.raises(ConfigError, match=words):
            tq.make_quantizer(wrong, "input")
    with pytest.raises(ConfigError, match="/token is for inputs and outputs"):
        tq.make_quantizer(TOKENS, "weight")


@pytest.mark.parametrize("n_bits", [8, 4, 2])
def test_tokens_keep_the_laws(n_bits: int) -> None:
    report = tq.check_quantizer(tq.make_quantizer(TOKENS.replace("8", str(n_bits)), "input"))
    assert set(report.skipped) == {"per_channel", "levels_used", "columns", "roundings", "pins"}
