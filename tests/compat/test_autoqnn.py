"""The AutoQNN dialect: the blocks of its readme, `convert`, its loops, its tools."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import DATA
from torchquant import QModuleState, QWrapper
from torchquant.compat import autoqnn
from torchquant.compat.autoqnn.core import clone_quantizer, convert
from torchquant.compat.autoqnn.utils import ModuleIOs, get_attainable_FLOPS, get_flops_params_mems, view_module
from torchquant.deploy import export_onnx
from torchquant.errors import ConfigError

BLOCKS = (DATA / "autoqnn_blocks.txt").read_text(encoding="utf-8").split("\n----\n")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8)


@pytest.mark.parametrize("block", BLOCKS, ids=["convert", "esb"])
def test_block_of_the_readme(block: str) -> None:
    """Only the imports are changed."""
    code = block.replace("import autoqnn\n", "import torchquant.compat.autoqnn as autoqnn\n")
    code = code.replace("from autoqnn.", "from torchquant.compat.autoqnn.")
    scope: dict[str, Any] = {"YourModel": Model, "YouModel": Model, "autoqnn": autoqnn}
    exec(compile(code, "<readme>", "exec"), scope)
    model = scope["q_model"]
    model(images()).sum().backward()
    assert isinstance(model.conv, autoqnn.modules.Conv2d)
    assert (model.conv.weight_quant.n_bits, model.conv.act_quant.n_bits) == (4, 4)
    assert len(model.conv.weight_quant(model.conv.weight).unique()) <= 16
    assert model.conv.weight.grad is not None


def quantizers() -> dict[str, Any]:
    return {
        "weight_quant": autoqnn.quantizers.VecQ(bitwidth=4, per_channel=True),
        "bias_quant": autoqnn.quantizers.FixedQuant(bitwidth=8),
        "act_quant": autoqnn.quantizers.VecQAct(bitwidth=8),
    }


def test_convert_computes_what_the_layer_does_with_quantized_tensors() -> None:
    net = Model().eval()
    model = convert(net, quantize_config_dict=quantizers())
    x = images()
    conv = model.conv
    model(x)
    weight, bias = conv.weight_quant(net.conv.weight), conv.bias_quant(net.conv.bias)
    expected = F.conv2d(conv.act_quant(x), weight, bias)
    assert torch.equal(conv(x), expected)


def test_each_layer_has_fresh_clones_and_channels_of_its_own() -> None:
    given = quantizers()
    given["weight_quant"].pre_observe(torch.randn(3, 5))
    model = convert(Model(), quantize_config_dict=given)
    assert len({id(m.weight_quant) for m in (model.conv, model.fc)}) == 2
    model(images())
    assert model.conv.weight_quant.get()[0].shape == (4,)
    assert model.fc.weight_quant.get()[0].shape == (10,)
    assert not clone_quantizer(given["weight_quant"]).is_ready


def test_modes_are_followed_and_evaluation_changes_nothing() -> None:
    model = convert(Model(), quantize_config_dict=quantizers()).train()
    model(images())
    assert model.conv.state is QModuleState.QUANT_AWARE_TRAIN
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items() if "num_batches" not in key}
    model(images())
    assert model.conv.state is QModuleState.QUANT_EVAL
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items() if "_extra_state" not in key)


def test_a_root_layer_and_in_place() -> None:
    layer = nn.Linear(4, 3)
    model = convert(layer, quantize_config_dict=quantizers())
    assert isinstance(model, autoqnn.modules.Linear)
    assert type(layer) is nn.Linear
    net = Model()
    assert convert(net, inplace=True, quantize_config_dict=quantizers()) is net
    assert isinstance(net.conv, QWrapper)


def test_mapping_chooses_the_layers() -> None:
    model = convert(Model(), {nn.Conv2d: autoqnn.modules.Conv2d}, quantize_config_dict=quantizers())
    assert isinstance(model.conv, autoqnn.modules.Conv2d)
    assert type(model.fc) is nn.Linear
    with pytest.raises(ConfigError, match=r"of the same name, got .*Conv2d.*Linear"):
        convert(Model(), {nn.Conv2d: autoqnn.modules.Linear})
    with pytest.raises(
        ConfigError,
        match="keys of quantize_config_dict must be among weight_quant, bias_quant, act_quant; got 'weight'",
    ):
        convert(Model(), quantize_config_dict={"weight": None})
    with pytest.raises(ConfigError, match=r"\['weight_quant'\] must be a quantizer or None, got 4"):
        convert(Model(), quantize_config_dict={"weight_quant": 4})  # type: ignore[dict-item]


def test_a_converted_model_copies_pickles_reloads_and_goes_back() -> None:
    model = convert(Model(), quantize_config_dict=quantizers())
    model(images())
    model.eval()
    x = images()
    fresh = convert(Model(), quantize_config_dict=quantizers()).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(x), model(x))
    net = Model()
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(fresh.conv.weight, net.conv.weight)


def test_a_converted_model_exports(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    given = {"weight_quant": autoqnn.quantizers.FixedQuant(8), "act_quant": autoqnn.quantizers.FixedQuantAct(8)}
    model = convert(Model(), quantize_config_dict=given)
    model(images())
    assert export_onnx(model.eval(), tmp_path / "model.onnx", images(1)) is not None


@pytest.mark.parametrize("kind", autoqnn.modules.LAYERS, ids=lambda kind: kind.__name__)
def test_every_layer_is_built_by_hand(kind: Any) -> None:
    rank = re.search(r"\d", kind.__name__)
    quant = {"weight_quant": autoqnn.quantizers.VecQ(4), "act_quant": autoqnn.quantizers.VecQAct(8)}
    if kind is autoqnn.modules.Bilinear:
        layer, inputs = kind(4, 3, 2, **quant), (torch.randn(2, 4), torch.randn(2, 3))
    elif rank is None:
        layer, inputs = kind(4, 3, **quant), (torch.randn(2, 4),)
    else:
        layer, inputs = kind(4, 3, 3, **quant), (torch.randn(2, 4, *[6] * int(rank[0])),)
    layer(*inputs).sum().backward()
    assert len(layer.weight_quant(layer.layer.weight).unique()) <= 16
    assert layer.bias_quant is None


def loader(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(images(), torch.randint(0, 10, (4,))) for _ in range(n)]


def test_loops_train_and_validate(capsys: pytest.CaptureFixture[str]) -> None:
    core = autoqnn.core
    model = convert(Model(), quantize_config_dict=quantizers())
    optimizer, batches = torch.optim.SGD(model.parameters(), 0.1), loader()
    before = core.validate(batches, model, F.cross_entropy, [core.top1, core.top5])
    for epoch in range(5):
        seconds, waiting, loss, metrics = core.train(batches, model, F.cross_entropy, optimizer, epoch, [core.top1], 1)
    assert 0 <= waiting <= seconds
    assert core.validate(batches, model, F.cross_entropy)[0] < before[0]
    assert len(metrics) == 1
    assert "Epoch: [4][3]\tLoss" in capsys.readouterr().out
    loss, metrics = core.validate_on_batch(batches, model, F.cross_entropy, [core.top1])
    again, _ = core.train_on_batch(batches, model, F.cross_entropy, optimizer, [core.top1])
    assert 0.0 <= metrics[0] <= 100.0
    assert loss > 0
    assert again > 0
    with pytest.raises(ConfigError, match="the loader yielded no batch"):
        core.validate([], model, F.cross_entropy)


def test_validate_averages_over_batches_of_any_size() -> None:
    net = Model().eval()
    x, labels = images(5), torch.randint(0, 10, (5,))
    loss, (share,) = autoqnn.core.validate(
        [(x[:4], labels[:4]), (x[4:], labels[4:])], net, F.cross_entropy, [autoqnn.core.top1]
    )
    with torch.no_grad():
        assert loss == pytest.approx(float(F.cross_entropy(net(x), labels)), rel=1e-5)
        assert share == pytest.approx(100.0 * float((net(x).argmax(1) == labels).float().mean()))


def test_a_model_is_viewed_as_text_or_picture(tmp_path: Path) -> None:
    nodes, edges, dot = view_module(Model(), (1, 3, 8, 8), tmp_path / "net.txt")
    assert nodes["conv"] == "conv: Conv2d"
    assert ("conv", "bn") in edges
    assert str(dot).startswith("digraph Net {")
    assert "conv: Conv2d  ->  bn" in (tmp_path / "net.txt").read_text()
    view_module(Model(), save_path=tmp_path / "net.gv")
    assert (tmp_path / "net.gv").read_text().startswith("digraph Net {")
    with pytest.raises(ConfigError, match=r"save_path must end with one of \.svg, .*; got 'net\.jpg'"):
        view_module(Model(), save_path=tmp_path / "net.jpg")

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if bool(x.sum() > 0) else x

    assert view_module(Branch())[1] == [("model", "a")]


def test_what_goes_through_quantizers_is_recorded_and_drawn(tmp_path: Path) -> None:
    model = convert(Model(), quantize_config_dict=quantizers())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, autoqnn.modules.Conv2d | autoqnn.modules.Linear)}
    records = ModuleIOs((name, layer.weight_quant) for name, layer in layers.items())
    with pytest.raises(ConfigError, match="nothing was recorded"):
        records.differences()
    records.register()
    model(images())
    records.unregister()
    assert list(records.differences()) == ["conv", "fc"]
    expected = float((model.conv.weight_quant(model.conv.weight) - model.conv.weight).detach().square().mean())
    assert records.differences()["conv"] == pytest.approx(expected)
    records.draw_differences(rows=2, save_path=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_counts_and_roofline(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    macs, n_params, memory = get_flops_params_mems(net, (2, 3, 8, 8), 8, 4, "net")
    assert (macs, n_params) == (4 * 36 * 27, 112)
    assert memory == 112 + 4 * 36 / 2
    assert "of net is [0.00GFLOPs,0.00M" in capsys.readouterr().out
    reached = get_attainable_FLOPS(net, (2, 3, 8, 8), "3090", 8, 4, "net")
    assert reached == pytest.approx(macs / memory * 936.2 * 2**30)
    assert "net is IO-bound model on 3090" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="device_key must be one of QS-855"):
        get_attainable_FLOPS(net, (2, 3, 8, 8), "4090")


def test_sparsity() -> None:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight[0] = 0
    each, together = autoqnn.utils.stats_sparsity([(layer, "weight"), (layer, "bias")])
    assert each == (0.5, 0.0)
    assert together == pytest.approx(0.4)
    model = convert(Model(), quantize_config_dict={"weight_quant": autoqnn.quantizers.Ternary()})
    model(images())
    shares = autoqnn.utils.stats_quantized_sparsity(model)
    assert list(shares) == ["conv.weight", "fc.weight"]
    assert 0.2 < shares["conv.weight"] < 0.7


@pytest.mark.parametrize(
    ("build", "n_keys"),
    [
        (autoqnn.models.resnet.ResNet14, 92),
        (autoqnn.models.resnet.ResNet20_simple_hiddens, 128),
        (lambda: autoqnn.models.vgg.vgg7_M(4), None),
        (lambda: autoqnn.models.vgg.vgg7_M_plane(4), None),
    ],
    ids=["resnet14", "resnet20_hiddens", "vgg7", "vgg7_plane"],
)
def test_networks_run_convert_and_train(build: Any, n_keys: int | None) -> None:
    net = build()
    assert n_keys in (None, len(net.state_dict()))
    given = {"weight_quant": autoqnn.quantizers.ClipQ(4), "act_quant": autoqnn.quantizers.ClipQAct(8)}
    model = convert(net, quantize_config_dict=given)
    y = model(torch.randn(2, 3, 32, 32))
    last = y[-1] if isinstance(y, list) else y
    assert last.shape == (2, 10)
    last.sum().backward()
    assert len(y) == (4 if isinstance(y, list) else 2)
