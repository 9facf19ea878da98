"""Sensitivity: every method against the same number computed by hand, and runs that go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant import QuantPlan, make_quantizer
from torchquant.errors import ConfigError, NonFiniteError
from torchquant.search import search_rules
from torchquant.search.allocation.curvature import hessian_trace
from torchquant.search.allocation.sensitivities import METHODS, Sensitivity, sensitivity

WEIGHT = ["affine:2/channel", "affine:4/channel"]
ACT = ["affine:3", "affine:6"]
RULES = [{"weight": WEIGHT}, {"names": ["0"], "output": ACT}]
FIRST, SECOND, MIDDLE = ("0", "weight"), ("2", "weight"), ("0", "output")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def data() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 5), torch.randint(0, 3, (n,))) for n in (7, 4)]


def quantized(x: Tensor, spec: str, site: str, *shown: Tensor) -> Tensor:
    quantizer = make_quantizer(spec, site)
    quantizer.allocate(x.shape[0])
    for seen in shown or (x,):
        quantizer.pre_observe(seen)
    return quantizer(x)


def by_hand(model: nn.Sequential, x: Tensor, point: tuple[str, str], spec: str, batches: Any) -> Tensor:
    """The model with one option at one point."""
    w0, w2 = model[0].weight, model[2].weight
    w0, w2 = (quantized(w, spec, "weight") if point == p else w for p, w in ((FIRST, w0), (SECOND, w2)))
    middle = F.relu(F.linear(x, w0, model[0].bias))
    if point == MIDDLE:
        middle = quantized(middle, spec, "output", *(F.relu(model[0](shown)) for shown, _ in batches))
    return F.linear(middle, w2, model[2].bias)


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@torch.no_grad()
@pytest.mark.parametrize("method", ["mse", "kl", "loss"])
def test_one_option_at_a_time_is_what_it_is_by_hand(method: str) -> None:
    model, batches = net(), data()
    found = sensitivity(model, RULES, batches[0][0], batches, method)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    reference = model(x)
    assert list(found.degradations) == [FIRST, MIDDLE, SECOND]
    assert found.reference_loss == pytest.approx(float(F.cross_entropy(reference, y)), rel=1e-5)
    for point, degradations in found.degradations.items():
        for spec, degradation in zip(found.options[point], degradations, strict=True):
            output = by_hand(model, x, point, spec, batches)
            want = {
                "mse": float((output - reference).double().square().mean()),
                "kl": kl(reference, output),
                "loss": float(F.cross_entropy(output, y) - F.cross_entropy(reference, y)),
            }[method]
            assert degradation == pytest.approx(want, rel=1e-4, abs=2e-7)


def test_the_rest_of_the_plan_quantizes_in_the_reference_too() -> None:
    model, batches = net(), data()
    rules = [{"weight": "affine:2/channel"}, {"names": ["2"], "weight": ["affine:2/channel", "affine:16/channel"]}]
    found = sensitivity(model, rules, batches[0][0], batches)
    with torch.no_grad():
        x = torch.cat([x for x, _ in batches])
        middle = F.relu(F.linear(x, quantized(model[0].weight, WEIGHT[0], "weight"), model[0].bias))
        change = F.linear(middle, quantized(model[2].weight, WEIGHT[0], "weight") - model[2].weight)
    assert found.degradations[SECOND][0] == pytest.approx(float(change.square().mean()), rel=1e-4)
    assert found.degradations[SECOND][1] < 1e-6 * found.degradations[SECOND][0]


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in METHODS:
        sensitivity(model, [{"weight": WEIGHT}], data()[0][0], data(), method, draws=2)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_hutchinson_is_exact_for_a_diagonal_and_converges_otherwise() -> None:
    diagonal = torch.rand(6, dtype=torch.float64)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert hessian_trace(lambda: (diagonal * w.square()).sum() / 2, w, draws=1) == pytest.approx(float(diagonal.sum()))
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.T

    def loss() -> Tensor:
        return w @ a @ w / 2

    errors = [abs(hessian_trace(loss, w, draws, tolerance=0.0) / float(a.trace()) - 1) for draws in (10, 4000)]
    assert errors[1] < 0.02
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (hessian_trace(loss, w, 10, generator=g) for g in draws)
    assert first == again != other


def test_hutchinson_stops_when_the_mean_is_steady() -> None:
    calls: list[int] = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            calls.append(1)
            return grads[0]

    w = torch.ones(3, requires_grad=True)
    hessian_trace(lambda: Count.apply(w).square().sum(), w, draws=50)
    few = len(calls)
    calls.clear()
    hessian_trace(lambda: Count.apply(w).square().sum(), w, draws=50, tolerance=0.0, patience=51)
    assert few < len(calls) / 5


def test_a_linear_or_unrelated_loss_has_no_curvature() -> None:
    w = torch.ones(3, requires_grad=True)
    assert hessian_trace(lambda: w.sum(), w) == 0.0
    assert hessian_trace(lambda: torch.ones(1, requires_grad=True).sum(), w) == 0.0
    with pytest.raises(ConfigError, match="requires a gradient"):
        hessian_trace(lambda: w.sum(), torch.ones(3))
    with pytest.raises(ConfigError, match="draws >= 1"):
        hessian_trace(lambda: w.sum(), w, draws=0)


def test_hawq_is_trace_over_n_times_squared_error() -> None:
    model = nn.Sequential(nn.Linear(1, 4))  # a diagonal Hessian: 2 / 4 * mean(x**2) for each of 4 weights
    batches = [(torch.randn(n, 1), torch.randn(n, 4)) for n in (5, 3)]
    found = sensitivity(model, [{"weight": ["affine:2", "affine:4"]}], batches[0][0], batches, "hessian", F.mse_loss)
    mean_square = float(torch.cat([x for x, _ in batches]).square().mean())
    weight = model[0].weight.detach()
    for spec, degradation in zip(found.options[FIRST], found.degradations[FIRST], strict=True):
        error = float((quantized(weight, spec, "weight") - weight).square().sum())
        assert degradation == pytest.approx(mean_square / 2 * error, rel=1e-4)


def test_hawq_converges_to_the_whole_hessian() -> None:
    model, batches = net(), data()
    found = sensitivity(model, [{"weight": WEIGHT}], batches[0][0], batches, "hessian", draws=150, seed=3)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for point, name in ((FIRST, "0.weight"), (SECOND, "2.weight")):
        weight = model.get_parameter(name).detach()

        def loss(flat: Tensor, name: str = name, weight: Tensor = weight) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, {name: flat.view_as(weight)}, (x,)), y)

        trace = torch.autograd.functional.hessian(loss, weight.flatten()).trace()
        error = (quantized(weight, WEIGHT[0], "weight") - weight).square().mean()
        assert found.degradations[point][0] == pytest.approx(float(trace * error), rel=0.2)


def test_a_trace_below_zero_counts_as_zero_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(1, 2))
    batches = [(torch.ones(3, 1), torch.zeros(3, 2))]
    with pytest.warns(UserWarning, match="below 0"):
        found = sensitivity(
            model, [{"weight": WEIGHT}], batches[0][0], batches, "hessian", lambda y, t: -(y - t).square().mean()
        )
    assert found.degradations[FIRST] == (0.0, 0.0)


def sample_gradients(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    found = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        found.append(torch.autograd.grad(loss, model.get_parameter(name))[0])
    return torch.stack(found)


def test_fisher_is_half_the_squared_gradients_times_squared_error() -> None:
    model, batches = net(), data()
    found = sensitivity(model, RULES, batches[0][0], batches, "fisher")
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for point, name in ((FIRST, "0.weight"), (SECOND, "2.weight")):
        fisher = sample_gradients(model, name, x, y).square().mean(0)
        weight = model.get_parameter(name).detach()
        for spec, degradation in zip(found.options[point], found.degradations[point], strict=True):
            error = (quantized(weight, spec, "weight") - weight).square()
            assert degradation == pytest.approx(float((fisher * error).sum() / 2), rel=1e-4)
    middle = F.relu(model[0](x)).detach().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(model[2](middle), y, reduction="sum"), middle)[0]
    shown = [F.relu(model[0](part)).detach() for part, _ in batches]
    for spec, degradation in zip(ACT, found.degradations[MIDDLE], strict=True):
        error = (quantized(middle.detach(), spec, "output", *shown) - middle.detach()).square()
        assert degradation == pytest.approx(float((gradient.square() * error).sum() / 2 / len(x)), rel=1e-4)


def test_fisher_of_a_folded_weight_is_in_the_units_of_its_quantizer() -> None:
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2.0)
        model[1].running_var.uniform_(0.5, 2.0)
    batches = data()
    rules = [{"names": ["0"], "weight": WEIGHT, "fold_bn": True}]
    found = sensitivity(model, rules, batches[0][0], batches, "fisher")
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    factor = (model[1].weight / (model[1].running_var + model[1].eps).sqrt())[:, None].detach()
    fisher = (sample_gradients(model, "0.weight", x, y) / factor).square().mean(0)
    folded = (model[0].weight * factor).detach()
    error = (quantized(folded, WEIGHT[0], "weight") - folded).square()
    assert found.degradations[FIRST][0] == pytest.approx(float((fisher * error).sum() / 2), rel=1e-3)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_that_runs_twice_has_the_gradient_of_both() -> None:
    model, x, y = Twice(), torch.randn(6, 4), torch.randint(0, 4, (6,))
    rules = [{"weight": WEIGHT}]
    found = sensitivity(model, rules, x, [(x, y)], "fisher").degradations["layer", "weight"][0]
    weight = model.layer.weight.detach()
    fisher = sample_gradients(model, "layer.weight", x, y).square().mean(0)
    error = (quantized(weight, WEIGHT[0], "weight") - weight).square()
    assert found == pytest.approx(float((fisher * error).sum() / 2), rel=1e-4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.lstm(self.embed(tokens))[0]
        return self.attend(y, y, y, need_weights=False)[0][:, -1]


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.filterwarnings("ignore:the Hessian of")
def test_layers_with_several_weights_and_attention(method: str) -> None:
    tokens, y = torch.randint(0, 7, (3, 5)), torch.randint(0, 4, (3,))
    rules = [{"weight": ["affine:2", "affine:8"]}]
    found = sensitivity(Recurrent().eval(), rules, tokens, [(tokens, y)], method, draws=3)
    assert [path for path, _ in found.degradations] == ["embed", "lstm", "attend"]
    assert (
        all(degradation >= 0.0 for degradations in found.degradations.values() for degradation in degradations)
        or method == "loss"
    )
    assert max(degradations[0] for degradations in found.degradations.values()) > 0.0


class Stop(Exception):  # noqa: N818 - not an error
    pass


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    model, batches = net(), data()
    measured: list[tuple[str, str]] = []

    def stop_after_two(point: tuple[str, str], degradations: tuple[float, ...]) -> None:
        measured.append(point)
        if len(measured) == 2:
            raise Stop

    def run(**kwargs: Any) -> Sensitivity:
        return sensitivity(model, RULES, batches[0][0], batches, **kwargs)

    with pytest.raises(Stop):
        run(out=tmp_path, on_place=stop_after_two)
    assert len(json.loads((tmp_path / "sensitivity.json").read_text(encoding="utf-8"))["places"]) == 2
    finished = run(out=tmp_path, on_place=lambda point, degradations: measured.append(point))
    assert measured == [FIRST, MIDDLE, SECOND]
    assert finished.degradations == run().degradations
    assert run(out=tmp_path, on_place=lambda point, degradations: measured.append(point)) == finished
    assert len(measured) == 3
    assert Sensitivity.load(tmp_path / "sensitivity.json") == finished
    assert [path.name for path in tmp_path.iterdir()] == ["sensitivity.json"]


def test_a_folder_is_of_one_run(tmp_path: Path) -> None:
    model, batches = net(), data()
    sensitivity(model, RULES, batches[0][0], batches, out=tmp_path)
    for change in ("method", "weights", "batches", "plan", "loss"):
        other, given, rules, kwargs = net(), batches, RULES, {}
        other.load_state_dict(model.state_dict())
        if change == "method":
            kwargs["method"] = "kl"
        elif change == "weights":
            other[2].bias.data[0] += 1
        elif change == "batches":
            given = [batches[0], (batches[1][0], 2 - batches[1][1])]
        elif change == "plan":
            rules = [{"weight": WEIGHT}]
        else:
            kwargs["loss"] = F.multi_margin_loss
        with pytest.raises(ConfigError, match=rf"other settings \(.*{change}: .* now\); choose another folder"):
            sensitivity(other, rules, batches[0][0], given, out=tmp_path, **kwargs)


def test_one_seed_gives_one_result() -> None:
    model, batches = net(), data()
    first, again, other = (
        sensitivity(model, [{"weight": WEIGHT}], batches[0][0], batches, "hessian", draws=4, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first.degradations != other.degradations


def test_inputs_in_dictionaries_and_a_plan_with_candidates() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(values)}

    model, batches = Named(), [({"values": x}, y) for x, y in data()]
    plan = QuantPlan.from_rules(search_rules([{"weight": "affine:{n}/channel"}], 2, 4), model, batches[0][0])
    for method in METHODS:
        found = sensitivity(
            model, plan, batches[0][0], batches, method, lambda out, y: F.cross_entropy(out["logits"], y), draws=2
        )
        assert found.options["layer", "weight"] == tuple(f"affine:{n}/channel" for n in (2, 3, 4))
    assert "affine:3/channel" in str(found)


def test_a_width_to_choose_is_the_same_as_a_list_of_widths() -> None:
    model, batches = net(), data()
    template, listed = (
        sensitivity(model, [{"names": ["0"], "output": given}], batches[0][0], batches, max_bits=5).degradations[MIDDLE]
        for given in ("clipq:{n}", [f"clipq:{n}" for n in (2, 3, 4, 5)])
    )
    assert template == listed


def test_without_targets_outputs_can_still_be_compared() -> None:
    x = torch.randn(4, 5)
    assert sensitivity(net(), RULES, x, [(x, None)], "kl").reference_loss is None
    with pytest.raises(ConfigError, match="'loss' needs targets"):
        sensitivity(net(), RULES, x, [(x, None)], "loss")
    with pytest.raises(ConfigError, match="'fisher' needs the argument loss"):
        sensitivity(net(), RULES, x, [(x, None)], "fisher", None)


def test_what_is_refused_and_how(tmp_path: Path) -> None:
    x, y = data()[0]
    with pytest.raises(
        ConfigError, match="'0', output: the method 'hessian' works for weights and biases only.*'fisher'"
    ):
        sensitivity(net(), RULES, x, [(x, y)], "hessian")
    with pytest.raises(ConfigError, match="one of mse, kl, loss, hessian, fisher, got 'hesian'"):
        sensitivity(net(), RULES, x, [(x, y)], "hesian")
    with pytest.raises(ConfigError, match="leave nothing to choose"):
        sensitivity(net(), [{"weight": "affine:4"}], x, [(x, y)])
    for batches, words in (([], "at least one batch"), ([x], "batch 0 must be"), ([(x[:0], y)], "has no sample")):
        with pytest.raises(ConfigError, match=words):
            sensitivity(net(), RULES, x, batches)
    with pytest.raises(ConfigError, match="the mean over the samples"):
        sensitivity(net(), RULES, x, [(x, y)], loss=lambda out, y: F.cross_entropy(out, y, reduction="none"))
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        sensitivity(net(), RULES, x, [(x, y)], loss=lambda out, y: out.sum() * float("nan"))
    with pytest.raises(ConfigError, match="two classes or more"):
        sensitivity(nn.Sequential(nn.Linear(5, 1)), [{"weight": WEIGHT}], x, [(x, None)], "kl")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write into the output folder"):
        sensitivity(net(), RULES, x, [(x, y)], out=tmp_path / "file")
    (tmp_path / "plan.json").write_text('{"torchquant_sensitivity": 1}', encoding="utf-8")
    with pytest.raises(ConfigError, match="does not hold a complete sensitivity"):
        Sensitivity.load(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="is not JSON"):
        Sensitivity.load(tmp_path / "file")
