"""Stages that match the output of blocks: goldens, every format, graphs and plain modules, resuming, messages."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.ptq.nets import with_statistics
from tests.ptq.oracles import GOLDENS, X, real
from tests.ptq.test_run import QUICK_SPECS, SLOW_SPECS
from torchquant import ptq
from torchquant.errors import ConfigError
from torchquant.graph.segments import in_segments
from torchquant.graph.traced import TracedModule
from torchquant.ptq.block import ActivationInTraining
from torchquant.ptq.functional.learned_rounding import expected_drop_error
from torchquant.ptq.layer import Layer
from torchquant.ptq.stretched import LearnedRatio
from torchquant.quantizers import Quantizer, make_quantizer
from torchquant.utils import weight_slots

BRECQ = "brecq:steps=12,rate=0.2"
ALL_SPECS = [spec for spec in (*QUICK_SPECS, *SLOW_SPECS) if spec != "nvfp4"]


class Residual(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.Conv2d(n, n, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.act(self.norm(self.one(x))))
        y += x
        return self.act(y)


class Net(nn.Module):
    """Residual blocks between layers outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.blocks = nn.Sequential(Residual(6), Residual(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.first(x)).mean((2, 3)))


BATCHES = list(torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1)).split(8))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return with_statistics(Net)


def quantized(net: nn.Module, weight: str = "affine:3/channel", output: str | None = "affine:6") -> nn.Module:
    rules = [{"types": ["Conv2d", "Linear"], "weight": weight, "output": output, "fold_bn": True}]
    model = tq.quantize(net, [*rules, {"types": ["add"], "output": output}], BATCHES[0])
    tq.calibrate(model, BATCHES, with_targets=False)
    return model


def distance(model: nn.Module, net: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((model(x) - net(x)).square().sum()) for x in BATCHES)


def check_on_grid(model: nn.Module) -> None:
    for slot in weight_slots(model):
        assert slot.quantizer is not None
        assert slot.quantizer.is_pinned
        levels = slot.quantizer(slot.seen())
        assert torch.equal(slot.quantizer.decode(slot.quantizer.encode(slot.seen())), levels), slot.key


def test_the_best_of_all_roundings_of_two_layers() -> None:
    golden = GOLDENS["block"]
    x = X[:, :2].float()
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)))
    net[0][0].weight.data, net[0][2].weight.data = (real(golden[key]).float() for key in ("W1", "W2"))
    found = {}
    for stage in ("brecq:rate=0.1,weight=1.0,steps=150", "brecq:rate=0.1,weight=1.0,steps=100,fisher=diag", "gptq"):
        model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:2,symmetric=narrow/channel"}], x)
        step = ptq.run(model, [stage], [x], blocks=["0"]).steps[0]
        codes = [slot.quantizer.encode(slot.seen()).flatten().tolist() for slot in weight_slots(model)]  # type: ignore[union-attr]
        with torch.no_grad():
            found[stage], power = float((model(x) - net(x)).double().square().sum()), float(net(x).square().sum())
        if stage != "gptq":
            assert codes == [golden["blockwise"]["W1"], golden["blockwise"]["W2"]]
            assert found[stage] == pytest.approx(golden["blockwise"]["block_sse"], rel=1e-5)
        if "fisher" not in stage and stage != "gptq":
            assert step.error == pytest.approx(found[stage] / power, rel=1e-5)
    assert golden["blockwise"]["block_sse"] < golden["layerwise"]["block_sse"] <= found["gptq"]


@pytest.mark.parametrize("weight", ["nvfp4", *(pytest.param(spec, marks=pytest.mark.slow) for spec in ALL_SPECS)])
def test_brecq_on_every_format(net: nn.Module, weight: str) -> None:
    model = quantized(net, weight)
    report = ptq.run(model, [BRECQ], BATCHES)
    assert [step.path for step in report.steps] == ["first", "blocks.0", "blocks.1", "head"]
    assert [step.note for step in report.steps if "nearest:" in step.note] == []
    for step in report.steps:
        assert step.error is not None
        assert step.nearest_error is not None
        assert step.error <= step.nearest_error
    check_on_grid(model)
    fresh = quantized(net, weight)
    fresh.load_state_dict(model.state_dict())
    fresh.eval()
    with torch.no_grad():
        assert torch.equal(fresh(BATCHES[0]), model(BATCHES[0]))


OTHERS = ("qdrop:steps=6", "autoround:unit=block,steps=6", "omniquant:steps=6,rate=0.1", "step_tuning:steps=6")
OTHERS += ("block_ap:steps=6",)
CASES = [(stage, spec) for stage in OTHERS for spec in (*QUICK_SPECS, *SLOW_SPECS)]
QUICK_CASES = [("block_ap:steps=6", "esb:4,k=1/channel"), ("autoround:unit=block,steps=6", "esb:4,k=1/channel")]


@pytest.mark.parametrize(
    ("stage", "weight"),
    [case if case in QUICK_CASES else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_every_stage(net: nn.Module, stage: str, weight: str) -> None:
    model, again = quantized(net, weight), quantized(net, weight)
    more = {"omniquant": [stage, "nearest"], "step_tuning": ["nearest", stage]}
    stages = more.get(stage.partition(":")[0], [stage])
    report = ptq.run(model, stages, BATCHES)
    for step in report.steps:
        if step.stage == stage and "has no numbers that can be set channel by channel" not in step.note:
            assert step.error is not None
            assert step.nearest_error is not None
            assert step.error <= step.nearest_error
    assert [step.error for step in ptq.run(again, stages, BATCHES).steps] == [step.error for step in report.steps]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    check_on_grid(model)


def test_stages_that_learn_scales_lower_the_error(net: nn.Module) -> None:
    for stages, weight in (
        (["omniquant:rate=0.3,steps=15"], "affine:2,symmetric=narrow/channel"),
        (["nearest", "step_tuning:rate=0.03,steps=15"], "affine:2/group=4"),
        (["block_ap:rate=0.03,steps=15"], "affine:2/group=4"),
    ):
        report = ptq.run(quantized(net, weight), stages, BATCHES, names=["blocks.0*"])
        gains = [step.gain for step in report.steps if step.stage == stages[-1] and step.gain is not None]
        assert max(gains) > 0.3, stages


def test_brecq_starts_from_a_rounding_before_it(net: nn.Module) -> None:
    model, expected = quantized(net), quantized(net)
    ptq.run(expected, ["gptq"], BATCHES)
    report = ptq.run(model, ["gptq", "brecq:steps=1,rate=1e-6"], BATCHES)
    assert [step.note for step in report.steps if step.stage.startswith("brecq")] == ["", "", "", ""]
    pairs = zip(weight_slots(model), weight_slots(expected), strict=True)
    assert all(torch.equal(now.seen(), before.seen()) for now, before in pairs)


def test_clipping_is_learned_before_a_rounding(net: nn.Module) -> None:
    report = ptq.run(quantized(net), ["gptq", "omniquant:steps=3"], BATCHES)
    said = [step.note for step in report.steps if step.stage.startswith("omniquant")]
    assert said[0] == "left as it is: first is rounded already; put omniquant before the rounding"


def test_gradients_of_a_stretched_grid() -> None:
    """As in LSQ: the rounding error inside, the level outside; checked on the golden of learned clipping."""
    golden = GOLDENS["lwc"]
    weight = real([golden["w"]]).float()
    quantizer = make_quantizer("affine:3/channel")
    wrapper = tq.QWrapper(nn.Linear(6, 1, bias=False), quantizer)
    wrapper.layer.weight.data = weight
    (slot,) = wrapper.weight_slots()
    quantizer.pin(slot.seen())
    learned = LearnedRatio(Layer(slot, slot.rows()))
    learned.ratio.data.fill_(golden["sigmoid_init"])
    found = learned.value()
    assert torch.allclose(found.flatten(), real(golden["w_hat"]).float())
    found.backward(2 * (found.detach() - weight))
    step = (float(weight.max()) - float(weight.min())) / 7
    assert learned.ratio.grad is not None
    assert float(learned.ratio.grad) == pytest.approx(golden["dsse_dh"] * step, rel=1e-4)


@pytest.mark.parametrize(
    "n_done", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_is_not_killed(net: nn.Module, n_done: int, tmp_path: Path) -> None:
    stages = ["qdrop:steps=4,rate=0.3,activation_steps=3", "brecq:steps=2,fisher=diag", "bias_correction"]
    whole = quantized(net)
    expected = ptq.run(whole, stages, BATCHES)
    seen: list[ptq.StepReport] = []

    def stop(step: ptq.StepReport) -> None:
        seen.append(step)
        if len(seen) == n_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptq.run(quantized(net), stages, BATCHES, out=tmp_path, on_step=stop)
    model = quantized(net)
    report = ptq.run(model, stages, BATCHES, out=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))
    assert [(s.stage, s.path, s.error) for s in report.steps] == [(s.stage, s.path, s.error) for s in expected.steps]


def test_expected_loss_under_dropping() -> None:
    drop, n = GOLDENS["qdrop"], 20000
    weight, rounded, x, changed = (real([drop[key]]) for key in ("w", "w_hat", "x", "x_hat"))

    class Given(Quantizer):
        n_bits = 8

        def quantize(self, x: Tensor) -> Tensor:
            return changed.expand_as(x)

    activation = ActivationInTraining(Given(), drop["p_float"], torch.Generator().manual_seed(0))
    found = (activation(x.expand(n, 4)).detach() @ rounded.T - x @ weight.T).square()
    expected = float(expected_drop_error(rounded, weight, x, changed, drop["p_float"]))
    assert float(found.mean()) == pytest.approx(expected, rel=0.03)
    assert expected == pytest.approx(drop["expected_loss"])


def test_a_graph_in_segments_computes_the_same(net: nn.Module) -> None:
    model = quantized(net)
    assert isinstance(model, TracedModule)
    model.eval()
    with torch.no_grad():
        expected = model(BATCHES[0])
        with in_segments(model, ["blocks.0", "blocks.1", "head"]) as found:
            assert torch.equal(model(BATCHES[0]), expected)
            (segment,) = found["blocks.1"]
            assert segment.calls == ("blocks.1.one", "blocks.1.two", "blocks.1.add")
            assert found["head"] == [model.head]
        assert torch.equal(model(BATCHES[0]), expected)


def test_layers_outside_of_blocks_and_what_no_batch_reaches() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](self.parts[1](self.parts[0](x)) if float(x.sum()) < 1e9 else self.parts[2](x))

    model = tq.quantize(Chosen(), [{"types": ["Linear"], "weight": "affine:3/channel"}])
    said = {step.path: step.note for step in ptq.run(model, [BRECQ], [torch.randn(8, 4)]).steps}
    assert said["parts.1"] == ""
    assert said["parts.2"] == "no batch reached it; rounded to nearest"
    assert said["parts.0"].startswith("is called again where it is rounded already")


def test_padding_tokens_are_left_out() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    torch.manual_seed(0)
    net, x, mask = Reader(), torch.randn(4, 5, 6), torch.ones(4, 5, dtype=torch.long)
    mask[:, 3:] = 0
    errors = []
    for last in (0.0, 50.0):
        x[:, 3:] = last
        batch = {"x": x.clone(), "attention_mask": mask}
        model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:3/channel"}], batch)
        errors.append(ptq.run(model, [BRECQ], [batch]).steps[0].error)
    assert errors[0] == errors[1]


def test_what_is_worse_than_before_is_undone(net: nn.Module) -> None:
    @ptq.PTQ.register("upward_block")
    class Upward(ptq.BlockStage):
        changes = "roundings"

        def optimize(self, block: ptq.Block, data: ptq.BlockData) -> dict[str, Tensor]:
            return {path: layer.neighbours(layer.weight)[1] for path, layer in block.layers.items()}

    try:
        model, nearest = quantized(net), quantized(net)
        report = ptq.run(model, ["upward_block"], BATCHES)
        assert all(step.note.startswith("undone: its error was") for step in report.steps)
        ptq.run(nearest, ["nearest"], BATCHES)
        with torch.no_grad():
            assert torch.equal(model(BATCHES[0]), nearest(BATCHES[0]))
        assert all(s.note == "" for s in ptq.run(quantized(net), ["upward_block"], BATCHES, keep="always").steps)
    finally:
        ptq.PTQ.unregister("upward_block")


def test_blocks_are_found_or_named(net: nn.Module) -> None:
    model = quantized(net)
    assert [(b.path, b.kind, b.layers) for b in ptq.find_blocks(model)] == [
        ("first", "Conv2d", ("first",)),
        ("blocks.0", "Residual", ("blocks.0.one", "blocks.0.two")),
        ("blocks.1", "Residual", ("blocks.1.one", "blocks.1.two")),
        ("head", "Linear", ("head",)),
    ]
    assert [b.path for b in ptq.find_blocks(model, ["blocks"])] == ["first", "blocks", "head"]
    assert str(ptq.find_blocks(model)).splitlines()[0].split() == ["block", "class", "layers", "weights"]
    for names, words in (
        (["block*.9"], r"no module with layers is called 'block\*.9'; there are first, blocks"),
        (["blocks*"], "blocks.0 lies inside blocks, which is a block too; name one of them"),
    ):
        with pytest.raises(ConfigError, match=words):
            ptq.find_blocks(model, names)
    report = ptq.run(model, [BRECQ], BATCHES, blocks=["blocks"])
    assert [step.path for step in report.steps] == ["first", "blocks", "head"]


def test_stages_on_layers_and_blocks_in_one_run(net: nn.Module) -> None:
    model, nearest = quantized(net), quantized(net)
    report = ptq.run(model, ["gptq", BRECQ, "descent", "refit", "calibrate", "bias_correction"], BATCHES)
    assert {step.stage for step in report.steps} == {"gptq", BRECQ, "descent", "refit", "calibrate", "bias_correction"}
    ptq.run(nearest, ["nearest"], BATCHES)
    assert distance(model, net) < 0.5 * distance(nearest, net)


@pytest.mark.parametrize(
    ("stages", "batches", "words"),
    [
        (["brecq"], [], "brecq looks at inputs and needs batches, got none"),
        (["brecq:fisher=full"], BATCHES, "fisher must be 'none' or 'diag', got 'full'"),
        (["qdrop:drop=1.5"], BATCHES, "drop must be a number >= 0 and < 1, got 1.5"),
        (["brecq:steps=0"], BATCHES, "steps must be a whole number >= 1, got 0"),
        (["autoround:unit=model"], BATCHES, "unit must be 'layer' or 'block', got 'model'"),
        (["brecq", "magr"], BATCHES, "magr changes weights, which brecq has settled before it"),
    ],
)
def test_what_cannot_be_run_is_said(net: nn.Module, stages: Any, batches: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ptq.run(quantized(net), stages, batches)


def test_inputs_that_are_not_finite(net: nn.Module) -> None:
    broken = [BATCHES[0] * float("nan")]
    report = ptq.run(quantized(net, output=None), [BRECQ], broken)
    assert "rounded to nearest: first: the outputs of the block have NaN or Inf" in report.steps[0].note


@pytest.mark.parametrize("kind", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_blocks_of_transformers(kind: str) -> None:
    """Masks and position embeddings go along; a cache of keys and values is not written twice."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"vocab_size": 30, "max_position_embeddings": 16, "initializer_range": 0.3}
    if kind == "bert":
        net, where = transformers.BertModel(transformers.BertConfig(**sizes)).eval(), "encoder.layer"
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=1)
        net, where = transformers.LlamaForCausalLM(config).eval(), "model.layers"
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    batches = [{"input_ids": torch.randint(0, 30, (3, 7)), "attention_mask": mask} for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tq.quantize(
            net, [{"types": ["Linear"], "weight": "affine:3/channel", "output": "affine:8"}], batches[0]
        )
        tq.calibrate(model, batches)
        report = ptq.run(model, [BRECQ], batches)
    steps = {step.path: step for step in report.steps if step.stage == BRECQ}
    assert {f"{where}.0", f"{where}.1"} <= steps.keys()
    for path in (f"{where}.0", f"{where}.1"):
        assert steps[path].note == ""
        assert steps[path].gain is not None
        assert steps[path].gain > 0
