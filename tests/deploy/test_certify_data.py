"""What certify is fed: numbers and labels that fit, one batch at a time; everything else is refused or fails."""

from __future__ import annotations

import dataclasses
import json
import weakref

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.deploy import certify, export_onnx
from torchquant.deploy.certificate.record import FinalOutputs, largest_apart
from torchquant.errors import ConfigError, NonFiniteError

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

X = torch.linspace(-1.0, 1.0, 64).reshape(16, 4)
LABELS = torch.arange(16) % 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = tq.quantize(net, "int8-ort", X)
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(X)
    return model, export_onnx(model, tmp_path_factory.mktemp("data") / "net.onnx", X, verify=False)


def test_not_a_number_in_the_inputs_is_refused(exported):
    broken = X.clone()
    broken[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"batch 1: 1 of 64 values of input \S+ are NaN"):
        certify(*exported, [X, broken], ways="integer")


def test_one_batch_is_held_at_a_time(exported):
    made: list[weakref.ref[torch.Tensor]] = []

    def batches():
        for _ in range(6):
            assert sum(ref() is not None for ref in made) <= 1
            x = X.clone()
            made.append(weakref.ref(x))
            yield x
            del x

    found = certify(*exported, batches(), ways="integer")
    assert (found.batches, found.samples, len(made)) == (6, 96, 6)
    assert found.passed


def test_labels_are_counted_over_all_batches(exported):
    model, path = exported
    with tq.qmodule_state(model, tq.QModuleState.QUANT_EVAL):
        right = int((model(X).argmax(1) == LABELS).sum())
    found = certify(model, path, list(zip(X.split(5), LABELS.split(5), strict=True)), ways="integer")
    assert {row.engine: row.accuracy for row in found.outputs}["simulation"] == right / 16
    column = certify(model, path, [(X, LABELS[:, None])], ways="integer")
    assert [row.accuracy for row in column.outputs] == [row.accuracy for row in found.outputs]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(X, LABELS[:7])], r"labels must be class numbers of shape \[16\].*got a tensor of shape \[7\]"),
        ([(X, nn.functional.one_hot(LABELS))], r"class numbers of shape \[16\].*\[16, 3\]"),
        ([(X, LABELS + 1)], "class numbers from 0 to 2, got numbers from 1 to 3"),
        ([(X, LABELS - 100)], "class numbers from 0 to 2, got numbers from -100 to -98"),
        ([(X, LABELS.float())], "whole numbers as labels; got a tensor .*float32"),
        ([(X, LABELS), X], "some batches have labels and others have none"),
        ([(X, "cats")], "got a tensor of shape .*, 'cats'"),
        ((X, LABELS), "takes 1 inputs .*got 2. To give labels, pass a list of"),
        ([X[:, :2]], r"batch 0: input \S+ takes tensor\(float\) of shape \['batch', 4\], got .*\[16, 2\]"),
        ([X.double()], r"takes tensor\(float\) .*float64"),
        ([X, X[:0]], "batch 1: .*must have samples along axis 0"),
        ({"x": X}, "data must be tensors or batches of them.*got {'x': a tensor"),
        ("data.pt", "data must be tensors or batches of them.*got 'data.pt'"),
    ],
    ids=range(13),
)
def test_data_of_another_form_is_refused(exported, data, message):
    with pytest.raises(ConfigError, match=message):
        certify(*exported, data, ways="integer")


def test_not_a_number_in_an_output_fails_the_certificate(exported, tmp_path):
    found = certify(*exported, X, ways="integer")
    rows = tuple(dataclasses.replace(row, not_numbers=2 * (row.engine == "ORT, as deployed")) for row in found.outputs)
    broken = dataclasses.replace(found, outputs=rows)
    assert found.passed
    assert broken.failures == ("ORT, as deployed: 2 values of the outputs are NaN",)
    assert json.loads(broken.save(tmp_path / "c.json").read_text())["passed"] is False


def test_not_a_number_is_counted_in_every_output_of_an_engine():
    finals = FinalOutputs()
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, float("nan"), 1.0]])
    finals.add({"integer reference": [good, good], "ORT": [good, bad]}, None)
    assert [row.not_numbers for row in finals.rows()] == [0, 1]


def test_infinities_that_are_equal_do_not_differ():
    inf = float("inf")
    assert largest_apart(torch.tensor([inf, 1.0]), torch.tensor([inf, 1.5])) == 0.5
    assert largest_apart(torch.tensor([inf, 1.0]), torch.tensor([2.0, 1.0])) > 1e300
    assert largest_apart(torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 3.0])) == 2.0


def test_labels_of_an_output_without_classes_mean_nothing():
    with pytest.raises(ConfigError, match="need a first output with classes on axis 1"):
        FinalOutputs().add({"integer reference": [torch.ones(4)]}, torch.zeros(4, dtype=torch.int64))
