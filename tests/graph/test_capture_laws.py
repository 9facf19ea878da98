"""In BYPASSED the model is the float model; where it quantizes, a graph holds only for the way it was traced."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import DATA
from torchquant import QModuleState, QuantPlan, capture, qmodule_state, quantize, set_qmodule_state
from torchquant.errors import ConfigError
from torchquant.graph.traced import TracedModule, graphs_running
from torchquant.qmodule import QOp, QWrapper
from torchquant.utils import qmodules, state_report

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
RULES = [{"weight": "affine:8,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"}]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)


class KeepsALoss(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.loss = y.square().mean()
        return self.last(y)


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.seen.append(1)
        return self.last(self.first(x))


class FillsADictionary(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["last"] = x.detach()
        return self.last(self.first(x))


class DrawsInPython(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y * 2 if random.random() < 0.5 else y)


class DrawsATensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + 0.1 * torch.rand(8))


class WritesAView(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        view = y.view(-1)
        view.mul_(0.5)
        return self.last(y)


class WritesInPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = F.relu(y, inplace=True)
        return self.last(y + z)


class WritesItsInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.last(self.first(x))


class WithoutGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.first(x).abs().mean()
        return self.last(self.first(x) / scale)


class Swallows(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        try:
            y = y * 2 if bool(y.sum() > 0) else y
        except Exception:
            y = y * 0
        return self.last(y)


LOSSES: list[Any] = []


class AppendsToAGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        LOSSES.append(y.detach().mean())
        return self.last(y)


HAZARDS = [KeepsALoss, Counts, FillsADictionary, DrawsInPython, DrawsATensor, WritesAView, WritesInPlace]
HAZARDS += [WritesItsInput, WithoutGradient, Swallows, AppendsToAGlobal]


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    random.seed(1)
    inputs = [a.clone() if isinstance(a, Tensor) else a for a in args]
    return model(*inputs, **kwargs), inputs


@pytest.mark.parametrize("example", [None, X], ids=["no_example", "example"])
@pytest.mark.parametrize("kind", HAZARDS, ids=lambda kind: kind.__name__)
def test_what_a_forward_does_beside_is_kept_in_every_state(kind: type[nn.Module], example: Any) -> None:
    LOSSES.clear()
    net = kind()
    before = copy.deepcopy(net.state_dict()), {name: dict(vars(m)) for name, m in net.named_modules()}
    states = random.getstate(), torch.get_rng_state()
    model = quantize(net, RULES, None if example is None else example.clone())
    assert not LOSSES
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), net.state_dict().values(), strict=True))
    for name, module in net.named_modules():
        assert vars(module).keys() == before[1][name].keys()
        assert all(vars(module)[key] is value for key, value in before[1][name].items())
    for training in (False, True):
        (expected, inputs), (found, others) = run(net.train(training), X), run(model.train(training), X)
        assert torch.equal(expected, found)
        assert torch.equal(inputs[0], others[0])
    with torch.no_grad(), qmodule_state(model, QModuleState.CALIBRATION):
        run(model, X)
    set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    (expected, inputs), (found, others) = run(net, X), run(model, X)
    assert torch.allclose(expected, found, atol=0.15 * float(expected.detach().abs().max()))
    assert not torch.equal(expected, found)
    assert torch.equal(inputs[0], others[0])
    found.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    if kind is KeepsALoss:
        assert model.loss.grad_fn is not None
    if kind is Counts:
        assert float(model.calls) == float(net.calls) + 1  # the calibration
        assert len(model.seen) == len(net.seen) + 1
    pickle.loads(pickle.dumps(copy.deepcopy(model.state_dict())))


class Optional(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, both: bool = False) -> Any:
        y = self.first(x) * scale
        y = self.last(y if mask is None else y * mask)
        return {"y": y, "twice": 2 * y} if both else y


@pytest.mark.parametrize("example", [None, (X,), (X, X > 0), {"x": X, "scale": 2.0, "both": True}])
def test_optional_arguments_are_those_of_each_call(example: Any) -> None:
    net = Optional()
    model = quantize(net, RULES, example)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((X,), {}),
        ((X, X > 0), {}),
        ((X,), {"mask": X > 0, "scale": 0.5}),
        ((X, None, 2.0), {"both": True}),
    ]
    for state in (QModuleState.BYPASSED, QModuleState.QUANT_AWARE_TRAIN):
        set_qmodule_state(model, state)
        for args, kwargs in calls:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # operators that are new in a call stay float
                found = model(*args, **kwargs)
            expected = net(*args, **kwargs)
            assert type(found) is type(expected)
            a, b = (expected["twice"], found["twice"]) if isinstance(expected, dict) else (expected, found)
            assert torch.equal(a, b) == (state is QModuleState.BYPASSED)
            assert a.shape == b.shape


def test_operators_that_a_call_brings_in_are_told_of() -> None:
    model = quantize(Optional(), RULES, X)
    set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    with pytest.warns(
        UserWarning, match=r"takes another path than when it was quantized \(another call.*stay float: mul"
    ):
        model(X, X > 0)


class Flags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.temperature = 1.0
        self.flat = False
        self.settings = {"gain": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x) / self.temperature * self.settings["gain"]
        return y.flatten() if self.flat else y


@pytest.mark.parametrize("state", [QModuleState.BYPASSED, QModuleState.QUANT_EVAL])
def test_attributes_that_change_later_are_seen(state: QModuleState) -> None:
    net = Flags()
    model = calibrated(quantize(net, RULES, X), X)
    set_qmodule_state(model, state)
    exact = 0.0 if state is QModuleState.BYPASSED else 0.1
    for name, value in (("temperature", 4.0), ("flat", True), ("flat", False)):
        setattr(net, name, value)
        setattr(model, name, value)
        assert torch.allclose(net(X), model(X), atol=exact)
    net.settings["gain"] = model.settings["gain"] = 3.0
    assert torch.allclose(net(X), model(X), atol=exact)


def calibrated(model: nn.Module, *inputs: Any) -> nn.Module:
    with torch.no_grad(), qmodule_state(model, QModuleState.CALIBRATION):
        model(*inputs)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    return model


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.gelu(self.norm(self.linear(x))), 0.5, self.training)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = Part(), Part(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x)) + x)


@pytest.mark.parametrize("state", [QModuleState.BYPASSED, QModuleState.QUANT_AWARE_TRAIN])
def test_a_part_in_evaluation_while_the_rest_trains(state: QModuleState) -> None:
    net = Parts()
    model = quantize(net, RULES, X)
    set_qmodule_state(model, state)
    for m in (net, model):
        m.train().a.eval()
        m.b.norm.eval()
    (expected, _), (found, _) = run(net, X), run(model, X)
    assert torch.allclose(expected, found, atol=0.0 if state is QModuleState.BYPASSED else 0.5)
    assert torch.equal(net.a.norm.running_mean, model.a.norm.running_mean)
    assert torch.equal(net.b.norm.running_mean, model.b.norm.running_mean)


@pytest.mark.parametrize("state", [QModuleState.BYPASSED, QModuleState.QUANT_EVAL])
def test_hooks_that_come_later_run_on_inner_containers_too(state: QModuleState) -> None:
    model = calibrated(quantize(Parts().eval(), RULES, X), X)
    set_qmodule_state(model, state)
    before = model(X)
    seen: list[str] = []
    handle = model.a.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.a.register_forward_hook(lambda module, args, y: seen.append("after") or y * 0)
    assert not torch.equal(model(X), before)
    assert seen == ["before", "after"]
    handle.remove()
    model(X)
    assert seen == ["before", "after", "after"]


def test_a_module_that_was_replaced_is_run_or_refused() -> None:
    net = Parts().eval()
    model = calibrated(quantize(net, RULES, X), X)
    net.last = model.last = nn.Linear(8, 2)
    set_qmodule_state(model, QModuleState.BYPASSED)
    assert torch.equal(model(X), net(X))
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    with pytest.raises(ConfigError, match=r"'last' was replaced by a Linear without quantizers. Quantize the float"):
        model(X)


def test_another_way_in_compiled_code_is_refused_and_then_compiles() -> None:
    model = calibrated(quantize(Flags(), RULES, X), X)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
    model.temperature = 2.0
    with pytest.raises(Exception, match="not traced for"):
        compiled(X)
    expected = model(X)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(X), expected)


def test_the_graph_is_compared_with_the_forward_in_training_too() -> None:
    class OtherInTraining(Base):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y * 2 if self.training and type(x) is Tensor else y)

    net = OtherInTraining()
    model = quantize(net, RULES, X)
    assert not isinstance(model, TracedModule)
    assert "computed something else on the example" in str(model.plan)
    assert torch.equal(model.train()(X), net.train()(X))


def test_graphs_compute_what_forwards_do() -> None:
    net = Parts()
    model = quantize(net, RULES)
    for training in (False, True):
        with graphs_running():
            (found, _), (expected, _) = run(model.train(training), X), run(net.train(training), X)
        assert torch.equal(found, expected)


class TwiceNorm(nn.Module):
    """A batch norm without affine, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.norm(x)))


class Walked(nn.ModuleDict):
    """Goes through its own children, and joins what they give."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for layer in self.values():
            parts.append(layer(torch.cat(parts, 1)))
        return torch.cat(parts, 1)


@pytest.mark.parametrize(
    "make",
    [
        TwiceNorm,
        lambda: Walked({"a": nn.Linear(8, 4), "b": nn.Linear(12, 4)}),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4)),
    ],
    ids=["norm_twice", "walked", "sequential"],
)
def test_modules_that_are_added_are_not_run_by_the_forward(make: Callable[[], nn.Module]) -> None:
    net = make().eval()
    model = calibrated(quantize(net, RULES, X), X)
    noise = (model(X) - net(X)).square().mean() / net(X).square().mean()
    assert noise < 1e-3
    set_qmodule_state(model, QModuleState.BYPASSED)
    assert torch.equal(model(X), net(X))
    copies = [copy.deepcopy(model), quantize(net, RULES, X)]
    copies[1].load_state_dict(model.state_dict())
    for other in copies:
        assert torch.equal(other(X), model(X))


def test_keys_are_those_of_the_float_model() -> None:
    net = Parts()
    model = quantize(net, "w8a8", X)
    assert model.state_dict().keys() >= net.state_dict().keys()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in net.named_parameters()]


def test_the_plan_says_what_it_leaves_and_why() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 3)
            self.norm = nn.BatchNorm1d(4, track_running_stats=False)
            self.table = nn.Parameter(torch.randn(6, 4))
            self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x[:, None])).transpose(1, 2) + self.table
            scores = (self.head(y) @ y.transpose(1, 2)).softmax(-1)
            return self.other(scores @ y)

    rules = [{**RULES[0], "fold_bn": True}, {"names": ["other"], "skip": True}]
    model = quantize(Many().eval(), rules, X)
    left = {f.path: f.why for f in model.plan.floats}
    assert left["other"] == "rule 2 skips it"
    assert "no running statistics" in left["norm"]
    assert "no layer owns" in left["table"]
    assert model.plan.sites[[s.path for s in model.plan.sites].index("matmul")].input == "affine:8"
    calibrated(model, X)
    ops = {path for path, module in qmodules(model) if isinstance(module, QOp)}
    assert "matmul" in ops


def test_a_plan_of_another_model_is_refused() -> None:
    plan = QuantPlan.from_rules(RULES, nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    with pytest.raises(
        ConfigError, match=r"'Linear \+ ReLU' at the site '0', but Sequential has 'Linear'. It was made for"
    ):
        plan.apply(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)))


def test_nothing_to_quantize_is_said() -> None:
    with pytest.warns(UserWarning, match="found nothing to quantize in Sequential"):
        quantize(nn.Sequential(nn.ReLU()), "w8a8")


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="Base|Parts"):
        quantize(Parts(), RULES, torch.randn(6, 3))


def test_calls_of_one_forward_share_a_range() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 8)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(a), self.head(b)

    net = Shared()
    model = quantize(net, RULES, (X, 10 * X))
    with torch.no_grad(), qmodule_state(model, QModuleState.CALIBRATION):
        for _ in range(3):
            model(X, 10 * X)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    expected, found = net(X, 10 * X)[1], model(X, 10 * X)[1]
    assert (found - expected).square().mean() / expected.square().mean() < 1e-3
    assert "union of 2 calls" in str(state_report(model))


def test_experts_that_no_batch_reached_do_not_block_weights() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[int(x.sum() > 0)](x)

    net = Experts()
    model = quantize(net, [{"weight": "affine:8,symmetric=narrow/channel"}], X)
    calibrated(model, X.abs())
    assert not torch.equal(model(-X.abs()), net(-X.abs()))
    assert torch.allclose(model(-X.abs()), net(-X.abs()), atol=0.05)


def test_models_that_0_1_pickled_run_copy_and_revert() -> None:
    saved = torch.load(DATA / "quantized_0_1.pt", weights_only=False)
    model, x, y = saved["model"], saved["x"], saved["y"]
    with torch.no_grad():
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), y)
        fresh = model.plan.apply(model.plan.revert(model)).eval()
        fresh.load_state_dict(saved["state"])
        assert torch.equal(fresh(x), y)


def test_capture_leaves_the_model_alone() -> None:
    net = Counts()
    capture(net, X)
    assert float(net.calls) == 0
    assert net.seen == []
    assert not isinstance(net.first, QWrapper)


class Mine(nn.Conv1d):
    """A layer of torch with nothing but another constructor."""

    def __init__(self, *args: Any, gain: float = 1.0) -> None:
        super().__init__(*args)
        self.gain = gain


class Positions(nn.Embedding):
    pass


class Standardized(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_subclasses_that_keep_the_forward_are_layers() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table, self.odd = Mine(1, 4, 3), Positions(6, 4), Standardized(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.odd(self.conv(x[:, None]))
            return y.transpose(1, 2) + self.table(torch.arange(6))

    net = Tagger().eval()
    rules = [{"types": ["Conv1d", "Embedding"], "weight": "affine:8,symmetric=narrow/channel"}]
    model = calibrated(quantize(net, rules, X), X)
    assert [site.path for site in model.plan.sites] == ["conv", "odd", "table"]
    assert torch.equal(model.odd.weights()[0][1], net.odd.weight - net.odd.weight.mean())
    assert not torch.equal(model(X), net(X))
    assert torch.allclose(model(X), net(X), atol=0.05)
