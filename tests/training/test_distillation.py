"""Distillation: its losses against golden numbers, and training with a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from tests.oracles import TRAINING_GOLDEN
from tests.ptq.oracles import close, real
from torchquant.errors import ConfigError
from torchquant.training import Distillation, attention_map_loss, distillation_loss, feature_loss, fit

X = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3
DATA = list(zip(X.split(8), LABELS.split(8), strict=True))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def test_golden_and_its_gradient() -> None:
    golden = TRAINING_GOLDEN["distillation"]
    student, teacher = (real([golden[who]]) for who in ("student", "teacher"))
    student.requires_grad_()
    value = distillation_loss(student, teacher, golden["temperature"])
    value.backward()
    close(value.detach(), golden["loss"])
    close(student.grad[0], golden["dloss_dstudent"])


def test_the_gradient_is_the_mean_over_samples_and_positions() -> None:
    student, teacher = (torch.randn(4, 5, 2, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    distillation_loss(student, teacher, 3.0).backward()
    expected = 3.0 * ((student.detach() / 3).softmax(1) - (teacher / 3).softmax(1)) / 8
    torch.testing.assert_close(student.grad, expected)


def test_attention_maps_do_not_see_size_nor_the_number_of_channels() -> None:
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    close(attention_map_loss(x, 3 * x.repeat(1, 2, 1, 1)), 0.0)
    one, other = (torch.zeros(1, 1, 2, dtype=torch.float64).index_fill_(2, torch.tensor([i]), 5.0) for i in (0, 1))
    close(attention_map_loss(one, other), 2.0)  # maps at right angles
    with pytest.raises(
        ConfigError, match=r"an attention map needs features of shape \(N, channels, \.\.\.\), with pos"
    ):
        attention_map_loss(x[0, 0], x[0, 0])


@pytest.mark.parametrize("loss", [distillation_loss, feature_loss, attention_map_loss])
def test_shapes_that_differ_are_named(loss: Any) -> None:
    with pytest.raises(ConfigError, match=r"must give tensors of one shape, .*; got .*4\] .*5\]"):
        loss(torch.rand(2, 3, 4), torch.rand(2, 3, 5))
    with pytest.raises(ConfigError, match=r"temperature must be above 0 and finite, got 0\.0"):
        distillation_loss(torch.rand(2, 3), torch.rand(2, 3), 0.0)


def steps(model: nn.Module, **options: Any) -> list[float]:
    seen: list[float] = []
    fit(
        model,
        **{"batches": DATA, "epochs": 1, "learning_rate": 1e-3, "on_epoch": lambda n, loss: seen.append(loss)}
        | options,
    )
    return seen


def test_the_loss_of_fit_is_the_sum_that_it_says() -> None:
    teacher, (x, labels) = net(1), DATA[0]
    with torch.no_grad():
        twin = net(2).train()
        hidden, wanted = twin[:3](x), teacher.eval()[:3](x)
        scores, theirs = twin[3:](hidden), teacher[3:](wanted)
        expected = 0.25 * F.cross_entropy(scores, labels) + 0.75 * distillation_loss(scores, theirs, 2.0)
        expected += 0.5 * (feature_loss(hidden, wanted) + attention_map_loss(hidden, wanted))
    named = {"features": {"2": "2"}, "attention_maps": {"2": "2"}, "feature_weight": 0.5}
    teacher.train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = net(2)
    assert steps(student, batches=DATA[:1], teacher=Distillation(teacher, 0.75, 2.0, **named)) == [float(expected)]
    assert teacher.training
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())


def test_a_model_is_a_teacher_of_half_the_loss() -> None:
    plain, with_model, with_half = net(2), net(2), net(2)
    assert steps(with_model, teacher=net(1)) == steps(with_half, teacher=Distillation(net(1), 0.5))
    assert steps(plain) != steps(net(2), teacher=net(1))
    assert all(torch.equal(a, b) for a, b in zip(with_model.parameters(), with_half.parameters(), strict=True))


def test_a_quantized_model_comes_nearer_to_its_float_model() -> None:
    float_model = net().eval()
    students = [tq.quantize(float_model, [{"weight": "ternary"}], X[:2]) for _ in range(2)]
    for student, teacher in zip(students, (None, float_model), strict=True):
        tq.calibrate(student, [X], show_progress=False)
        options: dict[str, Any] = {"state": tq.QModuleState.QUANT_AWARE_TRAIN, "show_progress": False}
        fit(student, DATA, 8, 1e-2, teacher=teacher and Distillation(teacher, 1.0), **options)
    with torch.no_grad():
        alone, taught = (float((student(X) - float_model(X)).square().mean()) for student in students)
    assert taught < 0.5 * alone


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the student has no module 'convs';.* see its named_modules\(\)"):
        steps(net(), teacher=Distillation(net(), features={"convs": "0"}))
    with pytest.raises(ConfigError, match=r"the teacher has no module '9'"):
        steps(net(), teacher=Distillation(net(), features={"0": "9"}))
    for wrong in ({"share": 1.5}, {"feature_weight": -1.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
            Distillation(net(), **wrong)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.spare = net(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.net(x)}

    options: dict[str, Any] = {"loss": lambda outputs, targets: F.cross_entropy(outputs["scores"], targets)}
    with pytest.raises(ConfigError, match=r"the scores of a model must be a tensor, .*; give Distillation scores="):
        steps(Named(), teacher=Named(), **options)
    taken = {"scores": lambda outputs: outputs["scores"]}
    steps(Named(), teacher=Distillation(Named(), **taken), **options)
    with pytest.raises(ConfigError, match="the module 'spare' gave no tensor in this batch"):
        steps(Named(), teacher=Distillation(Named(), features={"spare": "spare"}, **taken), **options)
