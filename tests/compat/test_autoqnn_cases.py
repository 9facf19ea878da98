"""AutoQNN's notebooks and examples as its users run them, on generated data, and the table that lists them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tests.compat.autoqnn_cases import DOCSTRINGS, NOTEBOOKS, ROWS
from tests.compat.test_autoqnn_datasets import write_cifar
from torchquant.compat import autoqnn
from torchquant.compat.autoqnn.utils import ModuleIOs

HERE = Path(__file__).parent


class Net(nn.Module):
    """A convolution, its batch norm, ReLU and pooling, as in the first notebook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.bn1 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.bn1(self.conv1(x))), (2, 2))


def test_every_row_has_its_test_and_every_example_its_row() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_*.py"))
    tests = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    assert {row.test for row in ROWS} <= tests
    assert {row.verdict for row in ROWS} == {"runs", "differs", "refused"}
    assert all(bool(row.why) == (row.verdict != "runs") for row in ROWS)
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert {*NOTEBOOKS, *(f"quantizers/{name}" for name in DOCSTRINGS)} <= set(names)


def test_demo_notebook() -> None:
    given = {
        "weight_quant": autoqnn.quantizers.FixedQuant(bitwidth=4),
        "act_quant": autoqnn.quantizers.FixedQuantAct(bitwidth=4),
    }
    q_model = autoqnn.core.convert(Net(), quantize_config_dict=given)
    nodes, edges, dot = autoqnn.utils.view_module(q_model, (1, 1, 32, 32))
    assert nodes["conv1"] == "conv1: Conv2d"
    assert ("conv1", "bn1") in edges
    assert "conv1" in str(dot)
    shown = repr(q_model)
    assert "FixedQuant(" in shown
    assert "FixedQuantAct(" in shown
    q_model(torch.randn(2, 1, 32, 32)).sum().backward()
    assert q_model.conv1.layer.weight.grad is not None


def test_cifar10_notebook(tmp_path: Path) -> None:
    """Train, validate, draw the curves, keep weights and curves, and find them again by their names."""
    sio = pytest.importorskip("scipy.io")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    torch.manual_seed(0)
    trainloader, testloader, classes = autoqnn.datasets.cifar.get_cifar_dataloader(
        10, 2, num_workers=0, root=write_cifar(tmp_path / "data"), dataset="cifar10"
    )
    candidates = {
        "vgg7_64": autoqnn.models.vgg.vgg7_64,
        "vgg7_64_plane": autoqnn.models.vgg.vgg7_64_plane,
        "resnet14": autoqnn.models.resnet.ResNet14,
        "resnet18": autoqnn.models.resnet.ResNet18,
    }
    model = candidates["resnet14"]()
    optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    loss, metrics, val_loss, val_metrics = (np.zeros(2) for _ in range(4))
    for epoch in range(2):
        autoqnn.core.adjust_learning_rate(optim, epoch, steps=[1])
        _, _, loss[epoch], metric = autoqnn.core.train(
            trainloader, model, criterion, optim, metric_meds=[autoqnn.core.top1], epoch=epoch
        )
        metrics[epoch] = metric[0].item()
        val_loss[epoch], metric = autoqnn.core.validate(
            testloader, model, criterion, metric_meds=[autoqnn.core.top1], print_freq=100
        )
        val_metrics[epoch] = metric[0].item()
    assert optim.param_groups[0]["lr"] == pytest.approx(0.01)
    assert len(classes) == 10
    figure, axes = plt.subplots()
    axes.plot(range(2), loss, label="Train")
    plt.close(figure)
    name = f"loss-{val_loss[-1]:.2f}-top1-{metric[0].item():.2f}"
    torch.save(model.state_dict(), tmp_path / f"state_dict-{name}.pth")
    sio.savemat(tmp_path / f"training_info-{name}.mat", {"training_info": {"loss": loss, "metrics": metrics}})
    kept = sio.loadmat(tmp_path / f"training_info-{name}.mat")["training_info"]["loss"][0, 0].reshape(-1)
    assert np.array_equal(kept, loss)
    fresh = candidates["resnet14"]()
    fresh.load_state_dict(torch.load(next(tmp_path.glob("state_dict-*.pth"))))
    again, _ = autoqnn.core.validate(testloader, fresh, criterion)
    assert again == pytest.approx(val_loss[-1])


def test_autoesb_notebook() -> None:
    """Search the widths of ESB quantizers, which the notebook announces."""
    torch.manual_seed(0)
    esb = autoqnn.quantizers.ESB_PerChannel(
        bitwidth=6, linear_bits=1, per_channel=False, freeze_bitwidth=False, target_bitwidth=4, max_bitwidth=6
    )
    given = {"weight_quant": esb, "act_quant": autoqnn.quantizers.ESBAct(bitwidth=6, linear_bits=2)}
    model = autoqnn.core.convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), None, False, given)
    batches = [(torch.randn(8, 8), torch.randint(0, 3, (8,))) for _ in range(20)]
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    autoqnn.core.train(batches, model, F.cross_entropy, optimizer, print_freq=0)
    widths = [int(layer.weight_quant.shadow_bitwidth) for layer in (model[0], model[2])]
    assert sum(n * size for n, size in zip(widths, (128, 48), strict=True)) / 176 <= 5
    assert autoqnn.core.precision_loss(model).item() < 1


@pytest.mark.parametrize("file", DOCSTRINGS)
def test_example_of_a_quantizer(file: str) -> None:
    """Convert the convolutions alone, train and validate on a batch, and draw what the quantizers do."""
    pytest.importorskip("matplotlib")
    module = importlib.import_module(f"torchquant.compat.autoqnn.quantizers.{file.removesuffix('.py')}")
    weight, act = (
        getattr(module, name)
        for name in sorted(
            (n for n, c in vars(module).items() if getattr(c, "__module__", "") == module.__name__), key=len
        )
    )
    wide = {} if file in ("binary.py", "ternary.py") else {"bitwidth": 4}
    given = {"weight_quant": weight(**wide), "bias_quant": weight(**wide), "act_quant": act(**wide)}
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    q_model = autoqnn.core.convert(net, {nn.Conv2d: autoqnn.modules.Conv2d}, True, given)
    assert q_model is net
    loader = [(torch.randn(4, 1, 8, 8), torch.randint(0, 3, (4,)))]
    optim = torch.optim.SGD(q_model.parameters(), lr=0.1, momentum=0.9)
    autoqnn.core.train_on_batch(loader, q_model, nn.CrossEntropyLoss(), optim, metric_meds=[autoqnn.core.top1])
    layers = {n: m for n, m in q_model.named_modules() if isinstance(m, autoqnn.modules.Conv2d)}
    records = [ModuleIOs((n, getattr(m, slot)) for n, m in layers.items()) for slot in ("act_quant", "weight_quant")]
    for record in records:
        record.register()
    autoqnn.core.validate_on_batch(loader, q_model, nn.CrossEntropyLoss(), metric_meds=[autoqnn.core.top1])
    for record in records:
        record.unregister()
        assert all(len(y.unique()) <= 16 for y in record.outputs.values())
    assert len(records[1].draw_differences(rows=2).axes) == 2


PUBLISHED = {  # multiply-adds of one image, in billions, as the notebook printed them
    **{"alexnet": 0.714692, "densenet121": 2.865672, "densenet201": 4.340971, "googlenet": 1.504880},
    **{"inception_v3": 5.731284, "mnasnet0_5": 0.110587, "mnasnet1_0": 0.325329, "mobilenet_v2": 0.314130},
    **{"mobilenet_v3_large": 0.226044, "mobilenet_v3_small": 0.059655, "resnet18": 1.819066, "resnet34": 3.671263},
    **{"resnet50": 4.111515, "resnet101": 7.833972, "resnet152": 11.558837, "squeezenet1_0": 0.823441},
    **{"shufflenet_v2_x1_0": 0.148808, "vgg11_bn": 7.631418, "vgg13_bn": 11.345245, "vgg16_bn": 15.510957},
    "vgg19_bn": 19.676669,
}
SMALL = ("shufflenet_v2_x1_0",)


@pytest.mark.parametrize("name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED])
def test_multiply_adds_of_the_21_nets(name: str) -> None:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net: Any = getattr(torchvision.models, name)(**options)
    size = 299 if name == "inception_v3" else 224
    macs, n_params, memory = autoqnn.utils.get_flops_params_mems(net, (1, 3, size, size), 32, 32, name, verbose=0)
    assert 0.94 * PUBLISHED[name] <= macs / 1e9 <= PUBLISHED[name]
    assert n_params == sum(p.numel() for p in net.parameters())
    assert memory > 4 * n_params


def test_dnn_analysis_notebook() -> None:
    """Compute attainable performance, time and energy, with the numbers that the notebook prints for AlexNet."""
    flops, memory = 0.714692e9, 248.841088e6
    peak, bandwidth, watts = autoqnn.utils.devices["2080ti"]
    attainable = min(peak, flops / memory * bandwidth)
    assert attainable / 1e12 == pytest.approx(1.8997, rel=1e-3)
    assert flops / attainable * watts == pytest.approx(0.09405, rel=1e-3)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 100))
    halves = [autoqnn.utils.get_attainable_FLOPS(net, (1, 3, 8, 8), "2080ti", bits, bits) for bits in (32, 16)]
    assert halves[1] == pytest.approx(2 * halves[0])
    assert len(autoqnn.utils.devices) == 9


def test_what_of_autoqnn_is_refused_says_why() -> None:
    assert sum(row.verdict == "refused" for row in ROWS) == 2
    with pytest.raises(AttributeError, match=r"datasets.tfrecord_read is not here: .* take imagenet.get_dataset"):
        autoqnn.datasets.tfrecord_read  # noqa: B018
    with pytest.raises(AttributeError, match=r"module_utils.clone_module is not here: .*torch.func.functional_call"):
        importlib.import_module("torchquant.compat.autoqnn.utils.module_utils").clone_module  # noqa: B018
    with pytest.raises(AttributeError, match=r"^module 'torchquant.compat.autoqnn.datasets' has no attribute 'other'"):
        autoqnn.datasets.other  # noqa: B018
