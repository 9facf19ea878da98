"""Messages for what people mistake: the wrong kind of thing, what to do instead, and never more than a page."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant._arguments import checked, described, fits
from torchquant._shown import shown
from torchquant.deploy import export_onnx
from torchquant.errors import LONGEST, ConfigError, TorchQuantError
from torchquant.qmodule import LayerPattern, QWeights
from torchquant.training import fit

X = torch.ones(2, 4)
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "spec for a quantizer": (
        lambda: tq.QOp(torch.add, "affine:8"),
        "QOp: acts_quantizer must be a Quantizer or None, got 'affine:8'; make_quantizer('affine:8') makes one",
    ),
    "function for a quantizer": (lambda: tq.QWrapper(nn.Linear(2, 2), abs, None), "got the function abs"),
    "class for a quantizer": (
        lambda: tq.QWrapper(nn.Linear(2, 2), tq.ESBQuantizer, None),
        "got the class ESBQuantizer; give an object: ESBQuantizer(...)",
    ),
    "spec for a weight": (lambda: QWeights(nn.Embedding(4, 2), {"weight": "affine:8"}), "'affine:8'"),
    "observer by name": (lambda: tq.AffineQuantizer(8, "minmax"), "got 'minmax'; BatchMinMax() is one"),
    "model's name": (lambda: tq.quantize("resnet18", "w8a8"), "model must be a Module, got 'resnet18'"),
    "a function for a model": (lambda: tq.quantize(torch.relu, "w8a8"), "got the function relu"),
    "a class for a model": (lambda: tq.capture(nn.Linear), "got the class Linear; give an object: Linear(...)"),
    "example of another shape": (
        lambda: tq.quantize(net(), "w8a8", torch.ones(2, 5)),
        "Sequential does not run on example_inputs (a tensor of shape [2, 5] and type float32): mat1 and mat2 shapes",
    ),
    "example of words": (lambda: tq.quantize(net(), "w8a8", "x"), "does not run on example_inputs ('x')"),
    "signed in words": (
        lambda: tq.QfmtQuantizer(8, "yes", tq.BatchMinMax()),
        "signed must be True or False, got 'yes'",
    ),
    "bits as a number": (lambda: tq.AffineQuantizer(8.0, tq.BatchMinMax()), "n_bits must be a whole number, got 8.0"),
    "NaN": (lambda: tq.ExpAvgMinMax(float("nan")), "momentum must be a number, got nan"),
    "batch norm of another size": (
        lambda: tq.QWrapper([nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4)], None, None),
        "the layer has 8 output channels, its batch norm 4",
    ),
    "row of nothing": (lambda: tq.register_pattern("Conv2d", LayerPattern()), "'package.module.Class'; got 'Conv2d'"),
    "state in words": (lambda: setattr(tq.QOp(abs, None), "state", "QUANT_EVAL"), "such as QModuleState.QUANT_EVAL"),
    "digits": (
        lambda: tq.make_quantizer("affine:" + "9" * 5000),
        "a spec has at most 200 characters, got 5007: 'affine:999",
    ),
    "a loss of one argument": (
        lambda: fit(net(), lambda: [], 1, 1e-3, 1, loss=lambda output: output),
        "fit: loss must be a function of 2 arguments",
    ),
    "a learning rate of NaN": (lambda: fit(net(), lambda: [], 1, float("nan"), 1), "learning_rate must be a number"),
    "a batch without targets": (lambda: fit(net(), lambda: [X], 1, 1e-3, 1), "batch 0 must be (inputs, targets)"),
    "no file's name": (lambda: export_onnx(quantized(), "", X, verify=False), "does not name a file to write"),
    "many things": (
        lambda: tq.quantize(net(), [{"names": ["x" * 50] * 10_000, "weight": "affine:8"}]),
        "selects no site",
    ),
}


def quantized() -> nn.Module:
    model = tq.quantize(net(), "int8-ort", X)
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(X)
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_message_says_what_came_what_is_allowed_and_what_to_do(case: str) -> None:
    do, message = CASES[case]
    with pytest.raises(TorchQuantError) as caught:
        do()
    assert message in str(caught.value)
    assert len(str(caught.value)) <= LONGEST


def test_a_file_that_grows_as_it_is_read_has_a_short_message(tmp_path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "plan.yaml").write_text(LAUGHS + "torchquant_plan: 1\nsites: [*h]\n")
    with pytest.raises(ConfigError) as caught:
        tq.QuantPlan.load(tmp_path / "plan.yaml")
    assert len(str(caught.value)) <= LONGEST
    import yaml

    grown = yaml.safe_load(LAUGHS)["h"]
    for rules in (
        [grown],
        [{"weight": grown}],
        [{"names": grown, "weight": None}],
        [{"weight": {"scheme": "affine", "x": grown}}],
    ):
        with pytest.raises(ConfigError) as caught:
            tq.quantize(net(), rules)
        assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [3, -1], [True, 3.0, "3", 2**70, None]),
        (float, [3, 0.5, float("inf")], [2**70, True, "3"]),
        (bool, [True], [1, "yes", None]),
        (int | None, [None, 3], [3.5]),
        (Sequence[str], [["a"], ("a",), []], ["a", [1], None]),
        (Iterable[int], [[1], iter([])], ["a", ["a"], torch.tensor(1)]),
        (tuple[float, float], [(1.0, 2)], [(1.0,), [1.0, 2.0]]),
        (Mapping[str, nn.Module], [{}, {"a": nn.ReLU()}], [{1: nn.ReLU()}, {"a": 1}]),
        (Callable[[int, int], int], [max, lambda a, b: a, nn.MSELoss()], [3, lambda a: a]),
        (type[nn.Module], [nn.ReLU], [nn.ReLU(), int]),
        (typing.Any, [None, 3], []),
    ],
)
def test_a_value_fits_its_annotation_or_not(hint: object, good: list[object], bad: list[object]) -> None:
    assert [value for value in good if not fits(hint, value)] == []
    assert [value for value in bad if fits(hint, value)] == []
    assert described(hint)


def test_a_plug_in_is_checked_unasked() -> None:
    class Halves(tq.Quantizer):
        n_bits = 1

        def __init__(self, step: float) -> None:
            super().__init__()
            self.step = step

        def quantize(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert Halves(0.5).step == 0.5
    with pytest.raises(ConfigError, match="Halves: step must be a number, got 'half'"):
        Halves("half")


def test_what_is_compiled_is_not_checked() -> None:
    @checked
    def double(x: torch.Tensor, times: int = 2) -> torch.Tensor:
        return x * times

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), 2 * X)


def test_what_came_is_shown_in_brief() -> None:
    inside: list[object] = []
    inside.append(inside)
    for value in (
        "x" * 10**6,
        [["x" * 100] * 100] * 100,
        inside,
        10**5000,
        dict.fromkeys(range(1000), X),
        b"x" * 10**6,
    ):
        assert len(shown(value)) <= 100
    assert shown(nn.Conv2d(1, 1, 1)) == "an object of the class Conv2d"


@pytest.mark.parametrize("verb", ["set_qmodule_state", "qmodule_state", "observe_weights"])
def test_a_state_of_a_model_without_quantizers_has_no_effect_and_says_so(verb: str) -> None:
    def do(model: nn.Module) -> None:
        if verb == "observe_weights":
            tq.observe_weights(model)
        elif verb == "set_qmodule_state":
            tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
        else:
            with tq.qmodule_state(model, tq.QModuleState.QUANT_EVAL):
                pass

    with pytest.warns(UserWarning, match=f"{verb} has no effect: Sequential has no QModule") as caught:
        do(net())
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        do(tq.quantize(net(), "w8a8"))
