"""Post-training runs: every algorithm on every format, resuming, and what they say when something is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.ptq.nets import with_statistics
from torchquant import ptq
from torchquant.errors import ConfigError, UnknownNameError
from torchquant.ptq.functional.columns import gptq
from torchquant.ptq.stage import LayerStage
from torchquant.ptq.streams import passes
from torchquant.utils import weight_slots

QUICK_SPECS = ("affine:4", "lsq:4/channel", "esb:4,k=1/channel", "affine:3/group=4", "nvfp4")
SLOW_SPECS = (
    *("affine:3,symmetric=narrow/channel", "qfmt:4,signed", "pot:3", "apot:4", "twn", "xnor/channel", "residual:2"),
    *("codebook:2", "fp4_e2m1/channel", "nf4/group=4", "mxfp4"),
)
SPECS = [*QUICK_SPECS, *(pytest.param(spec, marks=pytest.mark.slow) for spec in SLOW_SPECS)]
QUICK = {
    "adaround": "adaround:steps=30,rate=0.1",
    "autoround": "autoround:steps=10",
    "magr": "magr:steps=10",
    **{name: f"{name}:rank=2" for name in ("low_rank", "svdquant")},
}
STAGES = [QUICK.get(name, name) for name in ptq.PTQ if issubclass(ptq.PTQ[name], LayerStage)]


class Net(nn.Module):
    """A layer of every kind that is one product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = torch.relu(self.depthwise(y)) + y
        return self.head(torch.relu(self.up(self.grouped(y))).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return with_statistics(Net)


BATCHES = list(torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(1)).split(8))


def rules(weight: str, output: str | None) -> list[dict[str, Any]]:
    return [{"types": ["Conv2d", "ConvTranspose2d", "Linear"], "weight": weight, "output": output, "fold_bn": True}]


def quantized(net: nn.Module, weight: str, output: str | None = "affine:8") -> nn.Module:
    model = tq.quantize(net, rules(weight, output), BATCHES[0])
    tq.calibrate(model, BATCHES, with_targets=False)
    return model


def check_rounded(model: nn.Module, net: nn.Module, weight: str) -> None:
    """Every weight is on its grid, is found again by its codes, and survives a checkpoint."""
    for slot in weight_slots(model):
        assert slot.quantizer is not None
        levels = slot.quantizer(slot.seen())
        assert slot.quantizer.is_pinned
        assert torch.equal(slot.quantizer.decode(slot.quantizer.encode(slot.seen())), levels), slot.key
    fresh = tq.quantize(net, rules(weight, "affine:8"), BATCHES[0])
    fresh.load_state_dict(model.state_dict())
    fresh.eval()
    with torch.no_grad():
        assert torch.equal(fresh(BATCHES[0]), model(BATCHES[0]))


@pytest.mark.parametrize("weight", SPECS)
def test_gptq_on_every_format(net: nn.Module, weight: str) -> None:
    model = quantized(net, weight)
    report = ptq.run(model, ["gptq:act_order"], BATCHES)
    assert [step.note for step in report.steps if "nearest:" in step.note] == []
    for step in report.steps:
        assert step.error is not None
        assert step.nearest_error is not None
        assert step.error <= step.nearest_error * (1 + 1e-6)
    check_rounded(model, net, weight)


@pytest.mark.parametrize(
    "weight", ["esb:4,k=1/channel", *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW_SPECS)]
)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage(net: nn.Module, stage: str, weight: str) -> None:
    model, kind = quantized(net, weight), ptq.PTQ[stage.partition(":")[0]]
    stages = [stage] if issubclass(kind, ptq.Rounding) else [stage, "gptq"]
    stages = ["gptq", stage] if kind.changes == "bias" else stages
    report = ptq.run(model, stages, BATCHES)
    assert len(report.steps) == 5 * len(stages)
    again = quantized(net, weight)
    assert [step.error for step in ptq.run(again, stages, BATCHES).steps] == [step.error for step in report.steps]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    check_rounded(model, net, weight)


def test_gptq_of_one_layer_is_the_function() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(40, 6), nn.Linear(6, 3)
    model = tq.quantize(nn.Sequential(layer), [{"types": ["Linear"], "weight": "affine:3,symmetric=narrow/channel"}], x)
    weight, gram = layer.weight.detach().clone(), (x.double().T @ x.double() / 40)[None]
    ptq.run(model, ["gptq:match=layer"], [x[:20], x[20:]])
    (slot,) = weight_slots(model)
    assert slot.quantizer is not None
    expected = gptq(weight[None], gram, lambda x, columns: slot.quantizer.nearest(x[0], columns[0])[None])  # type: ignore[union-attr]
    assert torch.equal(slot.seen(), expected[0])


def test_algorithms_are_better_than_nearest_where_it_counts(net: nn.Module) -> None:
    def error(*stages: str) -> float:
        model = quantized(net, "affine:3,symmetric=narrow/channel", None)
        ptq.run(model, stages, BATCHES)
        x = torch.randn(64, 2, 6, 6, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            return float((model(x) - net(x)).square().mean())

    nearest = error("nearest")
    assert error("gptq") < 0.5 * nearest
    assert error("nearest", "bias_correction") < nearest
    assert error("gptq", "descent", "refit", "bias_correction") < 0.5 * nearest


def test_each_forward_runs_once_in_each_stream(net: nn.Module) -> None:
    model, calls = quantized(net, "affine:4/channel"), {"float": 0, "now": 0}

    class Counted(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            calls["now"] += 1
            return x

    counted = nn.Sequential(Counted(), model)
    ptq.run(counted, ["gptq"], BATCHES)
    assert calls["now"] == 2 * len(BATCHES)
    calls["now"] = 0
    ptq.run(nn.Sequential(Counted(), quantized(net, "affine:4/channel")), ["gptq:match=layer"], BATCHES)
    assert calls["now"] == len(BATCHES)


@pytest.mark.parametrize(
    "stages",
    [
        ["nearest"],
        ["gptq"],
        ["gptq:match=layer", "bias_correction"],
        ["calibrate", "gptq", "calibrate", "bias_correction"],
    ],
)
def test_a_run_does_what_its_preview_says(net: nn.Module, stages: list[str]) -> None:
    model, calls, held = quantized(net, "affine:4/channel"), {"now": 0, "float": 0}, {}
    planned = ptq.preview(model, stages)

    def count(module: nn.Module, args: Any) -> None:
        calls["float" if module.first.state == tq.QModuleState.BYPASSED else "now"] += 1

    handle = model.register_forward_pre_hook(count)
    find = ptq.LayerData.error

    def watched(data: ptq.LayerData, *args: Tensor) -> Tensor:
        held[data.path] = sum(t.nbytes for name, t in (data._sums | data._means).items() if "gram" in name)
        return find(data, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptq.LayerData, "error", watched)
        report = ptq.run(model, stages, BATCHES)
    handle.remove()
    assert planned.n_steps == len(report.steps)
    assert calls == {"now": planned.passes * len(BATCHES), "float": planned.float_passes * len(BATCHES)}
    assert [unit.path for unit in planned.units] == list(dict.fromkeys(step.path for step in report.steps if step.path))
    assert all(held.get(unit.path, 0) == unit.gram_bytes for unit in planned.units)
    assert sum(unit.weights for unit in planned.units) == sum(slot.weight.numel() for slot in weight_slots(model))


@pytest.mark.parametrize("n_done", [1, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4, 5, 7, 8, 9))])
def test_killed_and_resumed_is_not_killed(net: nn.Module, n_done: int, tmp_path: Path) -> None:
    stages = ["gptq", "descent", "calibrate", "bias_correction"] if n_done % 2 else ["gptq", "bias_correction"]
    whole = quantized(net, "affine:3/channel")
    expected = ptq.run(whole, stages, BATCHES)
    model, seen = quantized(net, "affine:3/channel"), []

    def stop(step: ptq.StepReport) -> None:
        seen.append(step)
        if len(seen) == n_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptq.run(model, stages, BATCHES, out=tmp_path, on_step=stop)
    model = quantized(net, "affine:3/channel")
    report = ptq.run(model, stages, BATCHES, out=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))
    assert [(s.stage, s.path, s.error) for s in report.steps] == [(s.stage, s.path, s.error) for s in expected.steps]
    assert ptq.PTQReport.load(tmp_path).steps == report.steps
    with pytest.raises(ConfigError, match="holds a run with other batches"):
        ptq.run(quantized(net, "affine:3/channel"), stages, BATCHES[:2], out=tmp_path)


@pytest.fixture
def upward() -> Any:
    @ptq.PTQ.register("upward")
    class Upward(ptq.Rounding):
        needs = frozenset({"gram"})

        def round(self, layer: ptq.Layer, data: ptq.LayerData) -> Tensor:
            return layer.neighbours(layer.weight)[1]

    yield Upward
    ptq.PTQ.unregister("upward")


def test_what_is_worse_than_nearest_is_undone(net: nn.Module, upward: Any) -> None:
    model, nearest = quantized(net, "affine:4/channel"), quantized(net, "affine:4/channel")
    report = ptq.run(model, ["upward"], BATCHES)
    assert all(step.note.startswith("undone: its error was") for step in report.steps)
    ptq.run(nearest, ["nearest"], BATCHES)
    with torch.no_grad():
        assert torch.equal(model(BATCHES[0]), nearest(BATCHES[0]))
    kept = quantized(net, "affine:4/channel")
    assert all(step.note == "" for step in ptq.run(kept, ["upward"], BATCHES, keep="always").steps)


def test_an_algorithm_may_only_ask_for_what_it_needs(net: nn.Module, upward: Any) -> None:
    upward.round = lambda self, layer, data: data.cross_gram
    report = ptq.run(quantized(net, "affine:4/channel"), ["upward"], BATCHES)
    assert "asks for 'cross_gram', which is not among what it needs" in report.steps[0].note


def test_padding_tokens_are_left_out() -> None:
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    x, mask = torch.randn(4, 5, 6), torch.ones(4, 5, dtype=torch.long)
    mask[:, 3:] = 0
    seen = []
    for last in (0.0, 50.0):
        x[:, 3:] = last
        batch = {"x": x.clone(), "attention_mask": mask}
        model = tq.quantize(Reader(), [{"types": ["Linear"], "weight": "affine:3/channel"}], batch)
        model.layer.layer.load_state_dict(nn.Linear(6, 4).state_dict() if not seen else seen[0][2])
        start = copy.deepcopy(model.layer.layer.state_dict())
        (step,) = ptq.run(model, ["gptq"], [batch]).steps
        seen.append((step.rows, step.error, start))
    assert seen[0][:2] == seen[1][:2]
    assert seen[0][0] == 12


def test_layers_that_no_batch_reaches_are_said() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if float(x.sum()) < 1e9 else self.b(x)

    x = torch.randn(8, 4)
    model = tq.quantize(Two(), [{"types": ["Linear"], "weight": "affine:3/channel"}])
    steps = ptq.run(model, ["gptq"], [x]).steps
    assert [(step.path, step.note) for step in steps] == [
        ("a", ""),
        ("b", "no batch reached it; rounded to nearest"),
    ]


def test_what_is_not_worked_on_is_said() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.reads = nn.Embedding(10, 6), nn.LSTM(6, 6, batch_first=True)
            self.twice, self.head = nn.Linear(6, 6), nn.Linear(6, 10)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            y = self.reads(self.table(tokens))[0]
            return self.head(self.twice(torch.relu(self.twice(y))))

    torch.manual_seed(0)
    tokens = torch.arange(20).view(4, 5) % 10
    rules = [{"types": ["Linear", "Embedding", "LSTM"], "weight": "affine:4/channel"}]
    model = tq.quantize(Tied(), rules, tokens)
    before = model.table.layer.weight.clone()
    said = {step.path: step.note for step in ptq.run(model, ["gptq"], [tokens]).steps}
    assert said["head"] == "stays rounded to nearest: its weight is that of table too"
    assert said["table"] == "stays rounded to nearest: its weight is that of head too"
    assert said["reads.weight_ih_l0"] == ""
    assert said["twice"].startswith("is called again where it is rounded already")
    assert torch.equal(model.table.layer.weight, before)


def test_a_bias_makes_the_means_equal() -> None:
    torch.manual_seed(0)
    x, net = torch.rand(50, 8), nn.Sequential(nn.Linear(8, 5))
    expected = net(x).mean(0)
    model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:2/channel"}], x)
    ptq.run(model, ["nearest", "bias_correction"], [x])
    assert torch.allclose(model(x).mean(0), expected, atol=1e-6)


def test_rounded_models_are_certified(net: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from torchquant.deploy import certify, export_onnx

    x = torch.randn(16, 4, 8)
    model = tq.quantize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), "int8-ort", x)
    tq.calibrate(model, [x], with_targets=False)
    ptq.run(model, ["gptq", "descent", "bias_correction"], [x])
    path = export_onnx(model, tmp_path / "model.onnx", x)
    assert certify(model, path, [x]).passed


@pytest.mark.parametrize(
    ("stages", "batches", "words"),
    [
        ([], BATCHES, "there are no stages to run"),
        (["gptq"], [], "gptq looks at inputs and needs batches, got none"),
        (["calibrate"], [], "calibrate looks at inputs and needs batches, got none"),
        (["gptq", "magr"], BATCHES, "magr changes weights, which gptq has settled before it; put magr first"),
        (["bias_correction", "gptq"], BATCHES, "gptq comes after bias_correction"),
        (["gptq:dump=1"], BATCHES, "gptq has no option dump; it has match, damp, act_order, block"),
        (["gptq:damp=much"], BATCHES, "damp"),
        (["gptq:match=both"], BATCHES, "match must be 'float' or 'layer', got 'both'"),
        ([{"gptq": {}, "gpfq": {}}], BATCHES, "a stage is a name, or one name with its options"),
    ],
)
def test_what_cannot_be_run_is_said(net: nn.Module, stages: Any, batches: Any, words: str) -> None:
    model = quantized(net, "affine:4/channel")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        ptq.run(model, stages, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_more_of_what_cannot_be_run(net: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'gptq'"):
        ptq.run(quantized(net, "affine:4"), ["gpqt"], BATCHES)
    with pytest.raises(ConfigError, match="the model has no quantized layers"):
        ptq.run(net, ["gptq"], BATCHES)
    model = quantized(net, "affine:4")
    with pytest.raises(ConfigError, match=r"no quantized weight is called 'layers.\*'; there are first"):
        ptq.run(model, ["gptq"], BATCHES, names=["layers.*"])
    ptq.run(model, ["gptq"], BATCHES, names=["head"])
    with pytest.raises(ConfigError, match="has been rounded already"):
        ptq.run(model, ["gptq"], BATCHES)
    broken = [BATCHES[0] * float("nan")]
    report = ptq.run(quantized(net, "affine:4", None), ["gptq"], broken)
    assert "has NaN or Inf" in report.steps[0].note


def test_passes_end_where_something_goes_wrong() -> None:
    layer = nn.Linear(2, 2)

    def call() -> None:
        layer(torch.zeros(1, 2))
        raise ValueError("in the forward")

    with passes({"layer": layer}, [call, call]) as (one, other):
        one.advance()
        other.advance()
        assert one.at == other.at == "layer"
        with pytest.raises(ValueError, match="in the forward"):
            one.advance()
    assert not other._thread.is_alive()
    assert not layer._forward_pre_hooks


def test_few_rows_are_told_and_still_of_use() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(4, 32)
    model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:3/channel"}], x)
    (step,) = ptq.run(model, ["gptq"], [x]).steps
    assert step.note == "4 rows of 32 inputs make a singular Gram matrix"
    assert step.gain is not None
    assert step.gain > 3.0


@pytest.mark.parametrize("stage", ["gptq", "brecq:steps=3"])
def test_a_limit_of_memory_changes_no_bit(net: nn.Module, stage: str) -> None:
    before = [batch.data_ptr() for batch in BATCHES]
    states, notes = [], []
    for limit in (None, 0, 2000, 10**9):
        model = quantized(net, "affine:4")
        report = ptq.run(model, [stage], BATCHES, cache_bytes=limit)
        states.append(model.state_dict())
        notes.append(report.steps[-1].note)
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)
    moved = [int(note.split()[0]) for note in notes[1:]]
    assert moved[0] > moved[1] > moved[2] == 0
    assert notes[1].endswith("bytes of waiting inputs were put into files")
    assert [batch.data_ptr() for batch in BATCHES] == before


@pytest.mark.parametrize(("n_rows", "n_inputs"), [(24, 64), (24, 96), (40, 48)])
def test_few_rows_are_damped_so_that_other_inputs_gain(n_rows: int, n_inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(n_inputs, n_inputs, generator=generator) * torch.linspace(2, 0.05, n_inputs)
    layer = nn.Linear(n_inputs, 32)
    layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
    batch, others = (torch.randn(n, n_inputs, generator=generator) @ mixed.mT for n in (n_rows, 512))

    def error(stage: str) -> float:
        net = nn.Sequential(layer)
        model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:4,symmetric=narrow/channel"}], batch)
        ptq.run(model, [stage], [batch])
        with torch.no_grad():
            return float((model(others) - net(others)).square().mean())

    assert error("gptq") < 0.95 * min(error("nearest"), error("gptq:damp=0.01"))


@pytest.mark.parametrize("stage", ["autoround:steps=40", "adaround:steps=40", "descent"])
def test_few_rows_are_damped_where_roundings_are_learned(stage: str) -> None:
    """What is fitted to half as many rows as inputs does worse on others; much damping is rounding to nearest."""
    torch.manual_seed(0)
    net, seen, others = nn.Linear(64, 32), torch.randn(32, 64), torch.randn(512, 64)

    def weight_and_error(*stages: str) -> tuple[Tensor, float]:
        model = tq.quantize(nn.Sequential(net), [{"types": ["Linear"], "weight": "affine:3/channel"}], seen)
        ptq.run(model, stages, [seen], keep="always")
        with torch.no_grad():
            (slot,) = weight_slots(model)
            return slot.seen().clone(), float((model(others) - net(others)).square().mean())

    nearest = weight_and_error("nearest")
    option = "," if ":" in stage else ":"
    errors = {damp: weight_and_error(f"{stage}{option}match=layer{damp}") for damp in ("", ",damp=0", ",damp=1e6")}
    assert errors[""][1] < errors[",damp=0"][1]
    assert float(errors[",damp=1e6"][0].ne(nearest[0]).to(torch.float32).mean()) < 0.02


class Scaled(nn.Module):
    """A layer whose few large inputs decide the means, and an output that divides them away."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y / x.square().mean(-1, keepdim=True)


@pytest.mark.parametrize("keep", ["best", "always"])
def test_biases_that_make_the_output_of_the_model_worse_are_undone(keep: str) -> None:
    torch.manual_seed(0)
    net, x = Scaled(), torch.randn(64, 8)
    x[:4] = 100 * torch.randn(8).abs()
    former = net.layer.bias.detach().clone()
    model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:2/channel"}], x)
    report = ptq.run(model, ["nearest", "bias_correction"], [x], keep=keep)
    (slot,) = weight_slots(model)
    assert slot.bias is not None
    is_undone = any(step.note.startswith("undone: the error of the model's output was") for step in report.steps)
    assert is_undone == torch.equal(slot.bias, former) == (keep == "best")
    plain = tq.quantize(nn.Sequential(net.layer), [{"types": ["Linear"], "weight": "affine:2/channel"}], x)
    assert len(ptq.run(plain, ["nearest", "bias_correction"], [x], keep=keep).steps) == 2
