"""Any model: where its sites are found, and that putting quantizers there changes nothing until they are on."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.processes import run_ranks
from torchquant import QModuleState, QuantPlan, QWrapper, capture, qmodule_state, quantize, set_qmodule_state
from torchquant.deploy import export_onnx, run_onnx
from torchquant.errors import ConfigError
from torchquant.graph.trace import TracedModule
from torchquant.qmodule import QOp, QWeights
from torchquant.qmodule.float_checkpoints import float_state_dict
from torchquant.utils import qmodules, state_report


class Block(nn.Module):
    """Residual, with an activation used twice, and operators as functions and as methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.down = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        for block in self.blocks:
            x = block(x)
        x = torch.cat([x, self.down(x).relu()], 1)
        x = F.dropout(x, 0.5, self.training)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.head(x.view(x.shape[0], -1))


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(n))


def test_sites_are_where_an_integer_engine_quantizes() -> None:
    captured = capture(Net())
    found = {site.path: (site.types[-1], tuple(kind for _, kind in site.fused)) for site in captured.sites}
    assert found == {
        "stem": ("Conv2d", ("ReLU",)),
        "blocks.0.conv1": ("Conv2d", ("BatchNorm2d", "ReLU")),
        "blocks.0.conv2": ("Conv2d", ("BatchNorm2d",)),
        "blocks.0.add": ("add", ("ReLU",)),
        "blocks.1.conv1": ("Conv2d", ("BatchNorm2d", "ReLU")),
        "blocks.1.conv2": ("Conv2d", ("BatchNorm2d",)),
        "blocks.1.add": ("add", ("ReLU",)),
        "down": ("Conv2d", ("ReLU",)),
        "cat": ("cat", ()),
        "avg_pool": ("avg_pool", ()),
        "head": ("Linear", ()),
    }
    assert captured.floats == ()


def test_a_value_is_quantized_once() -> None:
    """The input once; what passes through pooling, dropout, view is on its grid already."""
    model = quantize(Net(), "w8a8", image())
    inputs = [path for path, _ in qmodules(model) if "quantize" in path]
    assert inputs == ["quantize_x"]
    assert sum(site.site == "output" for site in state_report(model)) == 12


@pytest.mark.parametrize("training", [False, True])
def test_bypassed_is_the_float_model_bit_for_bit(training: bool) -> None:
    net = Net().train(training)
    model = quantize(net, "w8a8")
    outputs, gradients = [], []
    for m in (net, model):
        torch.manual_seed(0)
        y = m(image())
        y.square().sum().backward()
        outputs.append(y)
        gradients.append([p.grad for p in m.parameters()])
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert type(model).__name__ == "Net"
    assert isinstance(model, Net)


def test_training_is_asked_each_time() -> None:
    """Dropout as a function with self.training works in the mode the model is in when it runs."""
    model = quantize(Net().eval(), "w8a8")
    assert torch.equal(model(image()), model(image()))
    assert not torch.equal(model.train()(image()), model(image()))


def calibrated(model: nn.Module, *inputs: Any) -> nn.Module:
    with torch.no_grad(), qmodule_state(model.eval(), QModuleState.CALIBRATION):
        model(*inputs)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    return model


def test_copies_pickles_and_reloads_compute_the_same() -> None:
    net = Net()
    plan = QuantPlan.from_rules("w4a8", net)
    model = calibrated(plan.apply(net), image())
    expected = model(image())
    fresh = plan.apply(Net()).eval()
    assert fresh.load_state_dict(model.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [
        fresh,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in others:
        assert torch.equal(other(image()), expected)


def test_float_checkpoints_go_both_ways() -> None:
    net, other = Net(), Net()
    model = quantize(net, "w8a8")
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.eval()(image()), other.eval()(image()))
    net.load_state_dict(float_state_dict(model))
    assert torch.equal(net.eval()(image()), other(image()))


def test_revert_gives_the_float_model_with_the_weights_of_now() -> None:
    net = Net().eval()
    plan = QuantPlan.from_rules("w8a8", net)
    model = plan.apply(net)
    with torch.no_grad():
        model.head.layer.bias.zero_()
    reverted = plan.revert(model)
    assert type(reverted) is Net
    assert list(reverted.state_dict()) == list(net.state_dict())
    assert torch.equal(reverted(image()), model(image()))
    net.head.bias.data.zero_()
    assert torch.equal(reverted(image()), net(image()))
    assert not reverted._load_state_dict_pre_hooks
    assert not hasattr(reverted, "conversion")
    assert [m.inplace for m in reverted.modules() if isinstance(m, nn.ReLU)] == [True, True]
    with pytest.raises(ConfigError, match="was not made by a plan"):
        plan.revert(net)


def test_every_quantizer_learns_and_the_step_compiles_in_one_graph() -> None:
    model = quantize(Net(), "w4a4-lsq", image())
    set_qmodule_state(model.train(), QModuleState.QUANT_AWARE_TRAIN)
    model(image())
    model(image()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())] == []
    model.eval()
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(image()), model(image()))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.relu = nn.ReLU()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = self.relu(self.linear(a)), self.linear(b)
        return x @ y.transpose(0, 1), {"product": x * y}


def test_a_shared_layer_is_one_site_and_several_inputs_and_outputs_work() -> None:
    net = Shared()
    inputs = (torch.randn(3, 4), torch.randn(3, 4))
    model = quantize(net, "w8a8", inputs)
    assert [site.path for site in model.plan.sites] == ["linear", "matmul", "mul"]
    assert [path for path, _ in qmodules(model) if "quantize" in path] == ["quantize_a", "quantize_b"]
    expected, found = net(*inputs), model(*inputs)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1]["product"], found[1]["product"])
    calibrated(model, *inputs)
    assert isinstance(model.linear, QWrapper)


class Branch(nn.Module):
    """Control flow that depends on data, around a part that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if bool(x.sum() > 0) else self.b(x)


def test_where_a_forward_cannot_be_followed_layers_are_wrapped_and_the_reason_told() -> None:
    net, x = Branch(), torch.ones(2, 4)
    model = quantize(net, "w8a8", x)
    assert [site.path for site in model.plan.sites] == ["a.0", "a.2", "b"]
    (left,) = model.plan.floats
    assert (left.path, left.type) == ("", "Branch")
    assert left.why.startswith("operators between its layers: torch.fx cannot trace its forward")
    for sign in (1, -1):
        assert torch.equal(model(sign * x), net(sign * x))
    assert isinstance(model.b.input_quantizer, nn.Module)  # nothing is known of what it reads


class Alternating(nn.Module):
    """Does other things in training than in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.extra = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return (x, self.extra(x)) if self.training else x


def test_a_forward_that_changes_with_the_mode_keeps_doing_so() -> None:
    """Both ways are traced, and quantized; a layer that only training runs is a site too."""
    net, x = Alternating(), torch.randn(2, 4)
    model = quantize(net, "w8a8")
    assert [site.path for site in model.plan.sites] == ["body", "extra"]
    assert torch.equal(model.train()(x)[1], net.train()(x)[1])
    assert torch.equal(model.eval()(x), net.eval()(x))
    set_qmodule_state(model.train(), QModuleState.QUANT_AWARE_TRAIN)
    assert len(model(x)) == 2
    set_qmodule_state(model.eval(), QModuleState.QUANT_EVAL)
    assert isinstance(model(x), Tensor)
    assert not torch.equal(model(x), net.eval()(x))


class Misleading(nn.Module):
    """A graph follows the wrong branch, since a proxy is no Tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if type(x) is Tensor else self.linear(x) + 1.0


def test_a_graph_that_computes_something_else_is_not_used() -> None:
    net, x = Misleading(), torch.randn(2, 4)
    model = quantize(net, "w8a8", x)
    assert torch.equal(model(x), net(x))
    assert "computed something else on the example" in model.plan.describe()
    assert not isinstance(model, TracedModule)


class Sizes(nn.Module):
    """Arithmetic on sizes and on whole numbers, which is none of a quantizer's business."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[0] * ids.shape[1] + 0
        return self.linear(self.table(ids + 1)).reshape(n, 3)


def test_sizes_and_whole_numbers_are_no_sites() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    assert [site.path for site in capture(Sizes(), ids).sites] == ["table", "linear"]
    net = Sizes()
    model = quantize(net, "w8a8")  # nothing says that ids are whole numbers
    assert torch.equal(model(ids), net(ids))
    calibrated(model, ids)
    assert model(ids).shape == (4, 3)


def test_every_module_keeps_its_mode() -> None:
    net = Net().train()
    net.blocks[0].bn1.eval()  # a frozen batch norm
    model = quantize(net, "w8a8", image())
    modes = [model.blocks[i].conv1.bn.training for i in range(2)]
    assert modes == [False, True]
    before = model.blocks[0].conv1.bn.running_mean.clone()
    model(image())
    assert torch.equal(model.blocks[0].conv1.bn.running_mean, before)
    quantizers = [q for _, module in qmodules(quantize(Net().eval(), "w8a8")) for q in module.quantizers().values()]
    assert not any(quantizer.training for quantizer in quantizers)
    reverted = model.plan.revert(model)
    assert [reverted.blocks[i].bn1.training for i in range(2)] == [False, True]


def test_weights_that_a_function_is_given_are_told_of() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.ones(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.linear(x), self.weight)

    function, weight = capture(Functional()).floats
    assert (function.type, function.why) == (
        "linear",
        "it has no quantized form, nor have the weights in its arguments",
    )
    assert (weight.path, weight.type) == ("weight", "Functional.weight")


def test_hooks_stay_and_keep_their_layer_from_being_fused() -> None:
    seen: list[str] = []
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].register_forward_hook(lambda module, args, output: seen.append("after"))
    net[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    plan = QuantPlan.from_rules("w8a8", net)
    model = plan.apply(net)
    x = torch.randn(2, 4)
    calibrated(model, x)
    seen.clear()
    model(x)
    assert seen == ["before", "after"]
    assert model[0].activation is None
    plan.revert(model, inplace=True)(x)
    assert seen == ["before", "after"] * 2


def test_parametrizations_and_tied_weights_survive() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].parametrizations.weight.original1
    model = quantize(net, "w8a8")
    x = torch.randn(2, 4)
    assert torch.equal(model(x), net(x))
    assert model[2].layer.weight is model[0].layer.parametrizations.weight.original1
    set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    model(x).sum().backward()
    assert model[0].layer.parametrizations.weight.original0.grad is not None


def test_attributes_of_a_layer_are_found_on_its_wrapper() -> None:
    class Nosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.to(self.linear.weight.dtype)) * self.linear.in_features

    net, x = Nosy(), torch.randn(2, 4)
    model = quantize(net, "w8a8", x)
    assert torch.equal(model(x), net(x))
    assert model.linear.out_features == 4
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        _ = model.linear.wieght


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 3), torch.randn(2, 4)),
        (nn.Embedding(5, 3), torch.tensor([1, 2])),
        (nn.Conv1d(4, 3, 1), torch.randn(2, 4, 5)),
    ],
    ids=["linear", "embedding", "conv"],
)
def test_a_model_that_is_one_layer(layer: nn.Module, x: Tensor) -> None:
    plan = QuantPlan.from_rules("w8a8", layer)
    model = plan.apply(layer)
    assert isinstance(model, QWrapper | QWeights)
    assert torch.equal(model(x), layer(x))
    model.load_state_dict(layer.state_dict())
    assert type(plan.revert(model)) is type(layer)


def test_concatenated_tensors_can_share_one_quantizer() -> None:
    all_sites = {"weight": "affine:8/channel", "input": "affine:8", "output": "affine:8"}
    rules = [all_sites, {"types": "cat", "output": "share"}]
    model = calibrated(quantize(Net(), rules, image()), image())
    assert model.down.acts_quantizer is model.blocks[1].add.acts_quantizer
    assert not isinstance(getattr(model, "cat", None), QOp)
    fresh = quantize(Net(), rules)
    fresh.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(
        ConfigError, match="'cat', output: 'share' needs a quantizer at the output of each of its operands"
    ):
        quantize(Net(), [{"types": "cat", "output": "share"}])
    with pytest.raises(ConfigError, match="'share' is for concatenations"):
        quantize(Net(), [{"types": "Linear", "output": "share"}])


WEIGHTED: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "bilinear": (lambda: nn.Bilinear(4, 3, 2), (torch.randn(2, 4), torch.randn(2, 3))),
    "embedding": (lambda: nn.Embedding(6, 4), (torch.tensor([0, 5]),)),
    "embedding_bag": (lambda: nn.EmbeddingBag(6, 4), (torch.tensor([[0, 5], [1, 2]]),)),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True), (torch.randn(5, 2, 4),)),
    "gru": (lambda: nn.GRU(4, 3, batch_first=True), (torch.randn(2, 5, 4),)),
    "rnn": (lambda: nn.RNN(4, 3), (torch.randn(5, 2, 4),)),
    "lstm_cell": (lambda: nn.LSTMCell(4, 3), (torch.randn(2, 4),)),
    "gru_cell": (lambda: nn.GRUCell(4, 3), (torch.randn(2, 4),)),
    "rnn_cell": (lambda: nn.RNNCell(4, 3), (torch.randn(2, 4),)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), (torch.randn(5, 2, 4),) * 3),
    "attention_kdim": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2),
        (torch.randn(5, 2, 4), torch.randn(6, 2, 3), torch.randn(6, 2, 2)),
    ),
}


def first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", WEIGHTED)
def test_modules_with_weights_of_any_number(name: str) -> None:
    """Quantized, they compute what the float module computes with the quantized weights."""
    build, inputs = WEIGHTED[name]
    layer = build()
    model = quantize(layer, [{"weight": "affine:3/channel"}])
    assert torch.equal(first(model(*inputs)), first(layer(*inputs)))
    calibrated(model, *inputs)
    assert isinstance(model, QWeights)
    rounded = copy.deepcopy(layer).eval()
    with torch.no_grad():
        for weight_name, weight, quantizer in model.weights():
            assert quantizer is not None
            rounded.get_parameter(weight_name).copy_(quantizer(weight))
    torch.testing.assert_close(first(model(*inputs)), first(rounded(*inputs)))
    assert not torch.equal(first(model(*inputs)), first(layer.eval()(*inputs)))
    set_qmodule_state(model.train(), QModuleState.QUANT_AWARE_TRAIN)
    first(model(*inputs)).square().sum().backward()
    gradients = [weight.grad for _, weight, _ in model.weights() if weight.grad is not None]
    assert any(bool(gradient.any()) for gradient in gradients)


def test_a_bias_can_be_quantized_with_its_weight() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    model = quantize(net, [{"weight": "affine:8/channel", "bias": "affine:2"}])
    x = torch.randn(3, 4)
    calibrated(model, x)
    assert len(model(torch.zeros(1, 4)).unique()) <= 4
    with pytest.raises(ConfigError, match="site '0': a bias is quantized together with the weight"):
        quantize(net, [{"bias": "affine:2"}])


def test_a_quantized_model_is_not_captured_again() -> None:
    with pytest.raises(ConfigError, match="has QModules already"):
        capture(quantize(Net(), "w8a8"))


def test_a_captured_model_exports_and_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = calibrated(quantize(Net(), "int8-ort", image()), image())
    path = export_onnx(model, tmp_path / "model.onnx", image())
    with torch.no_grad():
        expected = model(image())
        step = float(model.head.acts_quantizer.affine_params().delta)
    torch.testing.assert_close(run_onnx(path, image()), expected, atol=1.01 * step, rtol=0.0)


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """Under DistributedDataParallel, with a shared hook-free model: the ranges are those of the joined batch."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    run_ranks(_rank, str(tmp_path), 2)
    ranges = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*ranges, strict=True))


def _rank(rank: int, folder: str, n_ranks: int) -> None:
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    model = quantize(Net(), "w8a8", image())
    set_qmodule_state(model.train(), QModuleState.QUANT_AWARE_TRAIN)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(image(2 + rank)).square().sum().backward()
    wrappers = [module for module in model.modules() if isinstance(module, QWrapper)]
    found = [number for module in wrappers for number in module.acts_quantizer.observer.get_ranges()]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
