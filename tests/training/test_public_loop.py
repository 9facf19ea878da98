"""`calibrate`, `evaluate` and `fit` on plain iterables of batches."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchquant as tq
from torchquant import QModuleState
from torchquant.errors import ConfigError, MissingDependencyError
from torchquant.training.batches import make_bar

X = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
RULES = "w8a8"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


class TwoInputs(nn.Module):
    """(a, b) or (a, b, scale)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
        found = self.a(a) + self.b(b)
        return found if scale is None else found * scale


class Masked(nn.Module):
    """(x) or (x, mask)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.fc(x if mask is None else x * mask)


def quantized(kind: type[nn.Module] = Net, example: Any = X[:2]) -> nn.Module:
    torch.manual_seed(0)
    return tq.quantize(kind(), RULES, example)


def by_hand(model: nn.Module, *calls: tuple[Any, ...]) -> dict[str, Tensor]:
    with tq.qmodule_state(model.eval(), QModuleState.CALIBRATION), torch.no_grad():
        for args in calls:
            model(*args)
    tq.set_qmodule_state(model, QModuleState.QUANT_EVAL)
    return model.state_dict()


def assert_same(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


PAIRS = [(X[:6], LABELS[:6]), (X[6:], LABELS[6:])]


@pytest.mark.parametrize(
    "batches",
    [
        X.split(6),
        list(X.split(6)),
        PAIRS,
        [list(pair) for pair in PAIRS],
        [(X[:6],), (X[6:],)],
        [{"x": X[:6]}, {"x": X[6:]}],
        [((X[:6],), LABELS[:6]), ({"x": X[6:]}, LABELS[6:])],
        DataLoader(TensorDataset(X, LABELS), 6),
        (x for x in X.split(6)),
    ],
    ids=["tensors", "list", "pairs", "lists", "tuples", "dicts", "nested pairs", "loader", "generator"],
)
def test_calibrate_is_the_state_machine_by_hand(batches: Any) -> None:
    model = quantized()
    wanted = by_hand(quantized(), (X[:6],), (X[6:],))
    assert tq.calibrate(model, batches) == 2
    assert_same(model, wanted)
    assert {row.state for row in tq.state_report(model)} == {"QUANT_EVAL"}


def test_two_arguments_are_not_inputs_and_targets() -> None:
    a, b = torch.randn(8, 4), torch.randn(8, 5)
    wanted = by_hand(quantized(TwoInputs, (a, b)), (a[:4], b[:4]), (a[4:], b[4:]))
    for batches in (
        DataLoader(TensorDataset(a, b), 4),
        [((a[:4], b[:4]), LABELS[:4]), ((a[4:], b[4:]), LABELS[4:8])],
        [{"a": a[:4], "b": b[:4]}, {"b": b[4:], "a": a[4:]}],
    ):
        model = quantized(TwoInputs, (a, b))
        assert tq.calibrate(model, batches) == 2
        assert_same(model, wanted)


def test_what_can_be_either_is_asked_for() -> None:
    x, mask = torch.randn(8, 4), torch.ones(8, 4)
    model = quantized(Masked, x)
    with pytest.raises(ConfigError, match="batch 0 can be .inputs, targets. or two arguments.*with_targets=True"):
        tq.calibrate(model, [(x, mask)])
    assert {row.state for row in tq.state_report(model)} == {"BYPASSED"}
    assert tq.calibrate(model, [(x, torch.zeros(8))], with_targets=True) == 1
    model = quantized(Masked, (x, mask))
    assert tq.calibrate(model, [(x, mask)], with_targets=False) == 1


def test_calibrate_gives_modes_back_and_takes_another_state() -> None:
    model = quantized().train()
    model.fc.eval()
    tq.calibrate(model, X.split(4), max_batches=2, state=QModuleState.QUANT_AWARE_TRAIN)
    assert model.training
    assert model.conv.training
    assert not model.fc.training
    assert {row.state for row in tq.state_report(model)} == {"QUANT_AWARE_TRAIN"}
    tq.set_qmodule_state(model, QModuleState.QUANT_EVAL)
    assert_same(model, by_hand(quantized(), (X[:4],), (X[4:8],)))


def test_max_batches_takes_no_more_from_the_source() -> None:
    taken: list[int] = []

    def source() -> Iterator[Tensor]:
        for i, x in enumerate(X.split(3)):
            taken.append(i)
            yield x

    done: list[int] = []
    assert tq.calibrate(quantized(), source(), max_batches=2, on_batch=done.append) == 2
    assert (taken, done) == ([0, 1], [1, 2])


@pytest.mark.parametrize("spec", ["bnn", "xnor"])
def test_signs_of_what_is_never_below_zero_are_named(spec: str) -> None:
    def calibrated(activation: nn.Module, spec: str) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), activation, nn.AvgPool2d(2), nn.Conv2d(4, 2, 1))
        x = torch.randn(4, 1, 8, 8)
        rules = [{"weight": "affine:8", "input": "affine:8", "output": spec}, {"position": "last", "output": None}]
        model = tq.quantize(net, rules, x)
        tq.calibrate(model, x.split(2))
        return model

    with pytest.warns(UserWarning, match="2 quantizers of activations give one value for all that they read: ") as told:
        model = calibrated(nn.ReLU(), spec)
    assert "0 output, 2 output" in str(told[0].message)
    assert told[0].filename == __file__
    assert {row.state for row in tq.state_report(model)} == {"QUANT_EVAL"}
    calibrated(nn.Hardtanh(), spec)
    calibrated(nn.ReLU(), "adabin_act")


def test_an_observer_that_saw_nothing_is_named() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.seldom = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, seldom: bool = False) -> Tensor:
            return self.seldom(x) if seldom else self.always(x)

    def wrapped() -> nn.Module:
        net = Branch()
        for name in ("always", "seldom"):
            layer = getattr(net, name)
            acts = tq.make_quantizer("affine:8", site="output")
            setattr(net, name, tq.QWrapper(layer, tq.make_quantizer("affine:8/channel"), acts))
        return net

    x = torch.randn(8, 4)
    with pytest.warns(UserWarning, match="1 quantizers saw no data in calibration.*: seldom output") as warned:
        tq.calibrate(wrapped(), [x])
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tq.calibrate(wrapped(), [{"x": x}, {"x": x, "seldom": True}])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no batches"),
        (X, "batches must be an iterable of batches, got a tensor of shape .*put a single batch in a list"),
        ({"x": X}, "batches must be an iterable of batches"),
        (["x"], "does not run on a batch"),
    ],
)
def test_wrong_batches_are_refused(batches: Any, message: str) -> None:
    model = quantized()
    with pytest.raises(ConfigError, match=message):
        tq.calibrate(model, batches)
    assert {row.state for row in tq.state_report(model)} == {"BYPASSED"}


def test_wrong_arguments_are_refused() -> None:
    model = quantized()
    with pytest.raises(ConfigError, match="max_batches must be at least 1, or None for all, got 0"):
        tq.calibrate(model, [X], max_batches=0)
    with pytest.raises(ConfigError, match="the device 'cdua' cannot be used"):
        tq.evaluate(model, PAIRS, device="cdua")
    with pytest.raises(ConfigError, match=r"batch 0 must be \(inputs, targets\), got a tensor"):
        tq.evaluate(model, [X])
    with pytest.raises(ConfigError, match="there are no batches to evaluate on"):
        tq.evaluate(model, [])
    with pytest.raises(ConfigError, match="otherwise give metric, a function of outputs and targets"):
        tq.evaluate(model, [(X, X)])
    with pytest.raises(ConfigError, match="the metric, if it is not one value per sample, must be a number"):
        tq.evaluate(model, PAIRS, metric=lambda outputs, targets: outputs)


# evaluate


def test_evaluate_is_the_accuracy_over_all_samples() -> None:
    model = Net().train()
    model.fc.eval()
    scores = model.eval()(X)
    model.train()
    model.fc.eval()
    batches = list(zip(X.split(5), LABELS.split(5), strict=True))
    assert tq.evaluate(model, batches) == float((scores.argmax(1) == LABELS).double().mean())
    assert tq.evaluate(model, batches, max_batches=1) == float((scores[:5].argmax(1) == LABELS[:5]).double().mean())
    assert model.training
    assert not model.fc.training


def test_evaluate_keeps_the_state() -> None:
    model = quantized()
    tq.calibrate(model, [X])
    quantized_scores = model.eval()(X).detach()
    loss = tq.evaluate(model, [(X, LABELS)], metric=nn.functional.cross_entropy)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(quantized_scores, LABELS)), rel=1e-6)
    assert {row.state for row in tq.state_report(model)} == {"QUANT_EVAL"}


def test_metrics_of_samples_and_of_batches_weigh_samples() -> None:
    model = Net().eval()
    batches = list(zip(X.split(5), LABELS.split(5), strict=True))  # 5, 5 and 2 samples
    with torch.no_grad():
        wanted = float(nn.functional.cross_entropy(model(X), LABELS))
    by_batch = tq.evaluate(model, batches, nn.functional.cross_entropy)
    by_sample = tq.evaluate(model, batches, lambda y, t: nn.functional.cross_entropy(y, t, reduction="none"))
    assert by_batch == pytest.approx(wanted, rel=1e-6)
    assert by_sample == pytest.approx(wanted, rel=1e-6)


def test_the_accuracy_of_every_pixel() -> None:
    labels = torch.randint(4, (2, 4, 4))
    scores = nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    labels[0, 0, 0] = (labels[0, 0, 0] + 1) % 4
    assert tq.evaluate(nn.Identity(), [(scores, labels)]) == 1 - 1 / 32


# fit


def state_after(model: nn.Module, batches: Any, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tq.fit(model, batches, epochs=2, learning_rate=1e-2, **options)
    return model.state_dict()


@pytest.mark.parametrize("batches", [lambda: iter(PAIRS), lambda: PAIRS], ids=["iterators", "lists"])
def test_fit_takes_iterables_and_functions_of_an_epoch(batches: Any) -> None:
    wanted = state_after(quantized(), batches, steps_per_epoch=2)
    model = quantized()
    state_after(model, PAIRS)
    assert_same(model, wanted)
    assert not model.training


def test_fit_in_a_state_is_fit_quantized() -> None:
    first, second = quantized(), quantized()
    state_after(first, PAIRS, state=QModuleState.QUANT_AWARE_TRAIN)
    torch.manual_seed(1)
    tq.training.fit_quantized(second, lambda: PAIRS, 2, 1e-2, 2)
    assert_same(first, second.state_dict())
    assert {row.state for row in tq.state_report(first)} == {"QUANT_EVAL"}


def test_fit_takes_dictionaries_and_a_limit() -> None:
    told: list[int] = []
    model = Net()
    before = model.conv.weight.detach().clone()
    batches = [({"x": x}, labels) for x, labels in PAIRS]
    tq.fit(model, batches, 3, 1e-2, max_batches=1, on_epoch=lambda epoch, loss: told.append(epoch))
    assert told == [1, 2, 3]
    assert not torch.equal(before, model.conv.weight)


def test_fit_says_what_it_needs_to_know() -> None:
    with pytest.raises(ConfigError, match="the number of batches of an epoch is unknown .*; give steps_per_epoch"):
        tq.fit(Net(), lambda: PAIRS, 1, 1e-2)
    with pytest.raises(ConfigError, match="batches must last for 2 epochs.*ends with the first"):
        tq.fit(Net(), iter(PAIRS), 2, 1e-2, steps_per_epoch=2)
    tq.fit(Net(), iter(PAIRS), 1, 1e-2, steps_per_epoch=2)


# Where, and what is shown


def test_batches_go_where_the_model_is() -> None:
    model = Net().to("meta")
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].device.type))
    tq.evaluate(model, [(X, LABELS)], metric=lambda outputs, targets: (seen.append(targets.device.type), 0.0)[1])
    assert seen == ["meta", "meta"]
    model = Net()
    tq.evaluate(model, PAIRS, device="meta", metric=lambda outputs, targets: 0.0)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_nothing_is_shown_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    model = quantized()
    tq.calibrate(model, [X])
    tq.evaluate(model, PAIRS, show_progress=True)
    tq.fit(model, PAIRS, 1, 1e-3)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal() -> None:
    rich = pytest.importorskip("rich.console")
    screen = io.StringIO()
    with make_bar(rich.Console(file=screen, force_terminal=True, width=80, color_system=None)) as bar:
        bar.advance(bar.add_task("calibrating", total=2))
    assert "calibrating" in screen.getvalue()
    assert "50%" in screen.getvalue()


def test_without_rich_it_is_silent_unless_a_bar_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    tq.evaluate(Net(), PAIRS)
    with pytest.raises(MissingDependencyError, match="'rich'"):
        tq.evaluate(Net(), PAIRS, show_progress=True)
