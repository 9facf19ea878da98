"""The analysis of sites against runs of whole models, and its facts against numpy."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.analysis.test_planted import Net, Tied, calibrated, pictures, trained
from torchquant.analysis import Analysis, advise, analyze, sqnr
from torchquant.analysis.effects import EffectSum, Judge
from torchquant.analysis.facts import SlotSum
from torchquant.analysis.replay import Replay
from torchquant.errors import ConfigError, UnobservedRangeError
from torchquant.graph.traced import graphs_running
from torchquant.qmodule import QModuleState

RULES = [{"weight": "affine:4", "output": "affine:6", "input": "affine:8", "fold_bn": True}]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return calibrated(trained(Net()), RULES, pictures())


@pytest.fixture(scope="module")
def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.arange(16) % 10) for x in pictures(3)]


@pytest.fixture(scope="module")
def analysis(model: nn.Module, labelled: list[tuple[Tensor, Tensor]]) -> Analysis:
    return analyze(model, labelled, loss=nn.functional.cross_entropy)


@torch.no_grad()
def output_with(model: nn.Module, quantized: set[str], x: Tensor) -> Tensor:
    """Run the model with these sites quantized, and nothing else of this package."""
    former = {path: module.state for path, module in tq.utils.qmodules(model)}
    for path, module in tq.utils.qmodules(model):
        module.state = QModuleState.QUANT_EVAL if path in quantized else QModuleState.BYPASSED
    try:
        with graphs_running():
            return model(x)
    finally:
        for path, module in tq.utils.qmodules(model):
            module.state = former[path]


def test_each_effect_is_that_of_a_run_of_the_whole_model(
    model: nn.Module, labelled: list[tuple[Tensor, Tensor]], analysis: Analysis
) -> None:
    paths = [site.path for site in analysis.sites]
    assert paths == [path for path, _ in tq.utils.qmodules(model)]
    assert len(paths) == 7

    def outputs(quantized: set[str]) -> Tensor:
        return torch.cat([output_with(model, quantized, x) for x, _ in labelled])

    targets = torch.cat([y for _, y in labelled])
    reference = outputs(set())
    subsets = [set(s) for n in range(len(paths) + 1) for s in itertools.combinations(paths, n)]
    truth = {frozenset(subset): sqnr(reference, outputs(subset)) for subset in subsets}
    for site in analysis.sites:
        assert site.alone.sqnr_db == pytest.approx(truth[frozenset([site.path])], abs=1e-6)
        assert site.all_but.sqnr_db == pytest.approx(truth[frozenset(paths) - {site.path}], abs=1e-6)
    assert analysis.whole.sqnr_db == pytest.approx(truth[frozenset(paths)], abs=1e-6)
    left_out = sorted(paths, key=lambda path: -truth[frozenset(paths) - {path}])
    assert sorted(paths, key=lambda path: -analysis.site(path).all_but.sqnr_db) == left_out
    assert [site.path for site in analysis.worst()] == sorted(paths, key=lambda path: truth[frozenset([path])])

    whole = outputs(set(paths))
    assert analysis.samples == len(targets)
    assert analysis.float_metric == pytest.approx(float((reference.argmax(1) == targets).double().mean()))
    assert analysis.whole.metric == pytest.approx(float((whole.argmax(1) == targets).double().mean()))
    assert analysis.whole.agreement == pytest.approx(float((whole.argmax(1) == reference.argmax(1)).double().mean()))
    assert analysis.whole.loss == pytest.approx(float(nn.functional.cross_entropy(whole, targets)), rel=1e-5)
    p, q = (scores.double().log_softmax(1) for scores in (reference, whole))
    assert analysis.whole.kl == pytest.approx(float(nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")))


def test_added_and_inherited_errors_are_those_of_a_layer_run_by_itself(
    model: nn.Module, labelled: list[tuple[Tensor, Tensor]], analysis: Analysis
) -> None:
    inputs: dict[str, list[Tensor]] = {"float": [], "quantized": []}
    outputs: dict[str, list[Tensor]] = {"float": [], "quantized": [], "own": []}
    third = model.third
    for kind, quantized in (("float", set()), ("quantized", {path for path, _ in tq.utils.qmodules(model)})):

        def look(module: nn.Module, args: tuple[Tensor], result: Tensor, kind: str = kind) -> None:
            inputs[kind].append(args[0].clone())
            outputs[kind].append(result.clone())

        handle = third.register_forward_hook(look)
        for x, _ in labelled:
            output_with(model, quantized, x)
        handle.remove()
    layer = third.layer
    with torch.no_grad():
        outputs["own"] = [layer(x) for x in inputs["quantized"]]
    y, inherited, got = (torch.cat(outputs[kind]).double() for kind in ("float", "own", "quantized"))
    signal = float(y.square().sum())
    site = analysis.site("third")
    assert site.added_db == pytest.approx(10 * math.log10(signal / float((got - inherited).square().sum())), abs=1e-6)
    assert site.inherited_db == pytest.approx(10 * math.log10(signal / float((inherited - y).square().sum())), abs=1e-6)
    assert analysis.site("quantize_x").inherited_db == math.inf


def test_slots_apart_are_those_of_a_model_without_the_other_quantizers(model: nn.Module) -> None:
    (x,) = pictures(1)
    found = analyze(model, [x], apart=True)
    reference = output_with(model, set(), x)
    for path in ("first", "third", "head"):
        apart = found.site(path).apart
        assert set(apart) == {"weight", "output"}
        for slot, names in (("weight", ("acts_quantizer",)), ("output", ("weight_quantizer",))):
            bare = copy.deepcopy(model)
            for name in names:
                setattr(bare.get_submodule(path), name, None)
            truth = sqnr(reference, output_with(bare, {path}, x))
            assert apart[slot].sqnr_db == pytest.approx(truth, abs=1e-6)
    assert Analysis.from_dict(found.to_dict()) == found
    assert "forward" not in model.first.weight_quantizer.__dict__


def test_what_comes_before_a_site_is_not_run_again(model: nn.Module) -> None:
    """Count convolutions: of L in a row, all sites together cost about L / 2 each, not L."""
    calls: Counter[str] = Counter()

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls[getattr(function, "__name__", "")] += 1
            return function(*args, **(kwargs or {}))

    with Counted():
        model(pictures(1)[0])
        in_one_run = calls["conv2d"]
        calls.clear()
        analyze(model, pictures(1))
    n_sites, kinds = 7, 2
    whole_runs = in_one_run * kinds * n_sites
    assert in_one_run == 3
    assert calls["conv2d"] < 0.8 * whole_runs


class Writes(nn.Module):
    """A model whose second layer writes to the result of the first, in place, after others have read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y * 2)
        y += z
        return self.third(self.act(y) + y)


def test_results_that_are_written_to_are_computed_again() -> None:
    torch.manual_seed(0)
    net, x = Writes().eval(), torch.randn(8, 4)
    model = calibrated(net, [{"types": ["Linear"], "weight": "affine:3"}], [x])
    found = analyze(model, [x])
    reference = output_with(model, set(), x)
    for site in found.sites:
        assert site.alone.sqnr_db == pytest.approx(sqnr(reference, output_with(model, {site.path}, x)), abs=1e-6)


class Overwrites(nn.Module):
    """Writes to what its first layer returned, in a forward that calls quantized modules."""

    def __init__(self) -> None:
        super().__init__()
        made = [tq.make_quantizer("affine:4,symmetric=narrow") for _ in range(2)]
        self.first, self.second = (tq.QWrapper(nn.Linear(8, 8), quantizer) for quantizer in made)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.view(-1, 8)).relu_())


def test_a_result_that_is_written_to_has_no_figures_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = Overwrites(), torch.randn(8, 8)
    tq.calibrate(model, [x])
    found = analyze(model, [x])
    assert (found.site("first").added_db, found.site("first").inherited_db) == (None, None)
    assert found.site("second").added_db is not None
    with torch.inference_mode():
        assert analyze(model, [x.clone()]) == found


def test_replay_gives_the_recorded_output_from_every_module(model: nn.Module) -> None:
    x = pictures(1)[0]
    replay = Replay(model)
    with torch.no_grad():
        expected = replay.record(lambda: model(x))
        skipped = []
        for _, module in tq.utils.qmodules(model):
            assert torch.equal(replay.again(module, lambda: model(x)), expected)
            skipped.append(replay.n_skipped)
    assert max(skipped) >= 4
    assert all("_call_impl" not in module.__dict__ for module in model.modules())


class Remembers(nn.Module):
    """A float module that another one reads behind the model's back: skipping it changes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.memory = Memory()

    def forward(self, x: Tensor) -> Tensor:
        self.memory.kept = None
        y = self.memory(self.first(x))
        return self.second(y) + (0 if self.memory.kept is None else self.memory.kept)


class Memory(nn.Module):
    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return x.relu()


def test_a_model_with_a_memory_is_run_whole_and_says_so() -> None:
    torch.manual_seed(0)
    net, x = Remembers().eval(), torch.randn(8, 4)
    net.first, net.second = (tq.QWrapper(layer, tq.make_quantizer("affine:3")) for layer in (net.first, net.second))
    tq.calibrate(net, [x])
    with pytest.warns(UserWarning, match="Remembers gives another output when modules whose result is known"):
        found = analyze(net, [x])
    reference = output_with(net, set(), x)
    for site in found.sites:
        assert site.alone.sqnr_db == pytest.approx(sqnr(reference, output_with(net, {site.path}, x)), abs=1e-6)


def test_facts_against_numpy() -> None:
    torch.manual_seed(0)
    quantizer = tq.make_quantizer("affine:4", site="output")
    op = tq.QOp(torch.relu, quantizer)
    x = torch.randn(8, 6, 5, 5)
    x[:, 2] *= 30.0
    x[:, 4] = 0.25
    quantizer.pre_observe(x)
    quantizer.observer.force_ranges(-3.0, 4.5)
    facts = SlotSum("op", "output", op, quantizer)
    facts.add(x, quantizer(x))
    found = facts.facts()
    values, levels = x.numpy().astype(np.float64).ravel(), quantizer(x).numpy().astype(np.float64).ravel()
    step = 7.5 / 15
    assert found.elements == values.size
    assert found.sqnr_db == pytest.approx(10 * np.log10((values**2).sum() / ((values - levels) ** 2).sum()), abs=1e-6)
    assert found.low == pytest.approx(levels.min())
    assert found.high == pytest.approx(levels.max())
    assert found.below == pytest.approx((values < levels.min() - step / 2).mean())
    assert found.above == pytest.approx((values > levels.max() + step / 2).mean())
    codes, counts = np.unique(np.round(levels / step), return_counts=True)
    shares = counts / counts.sum()
    assert (found.used, found.n_codes) == (len(codes), 16)
    assert found.entropy == pytest.approx(-(shares * np.log2(shares)).sum())
    assert found.top == pytest.approx(shares.max())
    assert found.mode == pytest.approx(codes[shares.argmax()] * step)
    assert found.first == pytest.approx(shares[0])
    centred = values - values.mean()
    assert found.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2)
    reach = np.abs(x.numpy()).transpose(1, 0, 2, 3).reshape(6, -1).max(1)
    assert found.channel_ratio == pytest.approx(reach.max() / torch.tensor(reach).median().item())
    assert (found.channel, found.n_channels, found.dead, found.killed) == (2, 6, 1, 0)


def test_a_stopped_analysis_goes_on_where_it_was(
    model: nn.Module, labelled: list[tuple[Tensor, Tensor]], analysis: Analysis, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(done: int) -> None:
        if done == 2:
            raise StopError

    options = {"loss": nn.functional.cross_entropy, "out": tmp_path}
    with pytest.raises(StopError):
        analyze(model, labelled, on_batch=stop, **options)
    ran = Counter[int]()

    def hooked(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        ran[len(args[0])] += 1

    handle = model.register_forward_pre_hook(hooked)
    found = analyze(model, labelled, **options)
    once = ran.total()
    ran.clear()
    assert analyze(model, labelled, **options) == found
    handle.remove()
    assert ran.total() == 0 < once
    assert found == analysis
    assert Analysis.load(tmp_path) == found == Analysis.from_dict(found.to_dict())
    assert {file.name for file in tmp_path.iterdir()} >= {"analysis.json", "sites.csv", "slots.csv"}
    with pytest.raises(ConfigError, match="batch 0 is not the one"):
        analyze(model, labelled[1:], **options)
    with pytest.raises(ConfigError, match="is of 3 batches, and there are 2 now; choose another folder"):
        analyze(model, labelled[:2], **options)
    torch.manual_seed(5)
    other = calibrated(trained(Net()), RULES, pictures())
    with pytest.raises(ConfigError, match="of another model, metric or loss"):
        analyze(other, labelled, **options)


def test_two_analyses_are_compared(model: nn.Module, labelled: list[tuple[Tensor, Tensor]]) -> None:
    worse = calibrated(trained(Net()), [*RULES, {"names": ["head"], "weight": "affine:2"}], pictures())
    before, after = (analyze(m, labelled[:1]) for m in (model, worse))
    changes = before.diff(after)
    assert {change.path for change in changes} >= {"(whole)", "head"}
    assert changes[0].figure == "sqnr_db"
    assert "head" in str(changes)
    assert before.diff(before) == []


def test_modes_and_states_are_restored_and_nothing_stays(model: nn.Module) -> None:
    model.train()
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    analyze(model, pictures(1))
    assert model.training
    assert {m.state for _, m in tq.utils.qmodules(model)} == {QModuleState.QUANT_AWARE_TRAIN}
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())
    model.eval()
    tq.set_qmodule_state(model, QModuleState.QUANT_EVAL)


def test_models_of_other_kinds() -> None:
    """Recurrent layers, attention, tied embeddings, a regression, a shared module, per-token scales."""
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(20 * self.layer(x).relu())

    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    for net, rules in ((Recurrent(), "w8a8"), (Shared(), "w8a8"), (attention, "w8a8-transformer")):
        x = torch.randn(4, 6, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tq.errors.StaysFloatWarning)
            model = tq.quantize(net.eval(), rules, x)
        tq.calibrate(model, [x])
        found = analyze(model, [x])
        assert [site.path for site in found.sites] == [path for path, m in tq.utils.qmodules(model) if m.quantizers()]
        reference = output_with(model, set(), x)
        for site in found.sites:
            assert site.alone.sqnr_db == pytest.approx(sqnr(reference, output_with(model, {site.path}, x)), abs=1e-6)
            assert site.alone.kl is None
        assert str(found)
    tokens = torch.randint(50, (8, 12))
    tied = calibrated(Tied().eval(), [{"weight": "affine:8,symmetric=narrow"}], [tokens])
    assert analyze(tied, [tokens]).shared() == {}


def test_calls_of_one_module_with_different_ranges_are_found() -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(50 * self.layer(x))

    x = torch.randn(32, 8)
    model = calibrated(Twice().eval(), [{"weight": "affine:8", "output": "affine:8"}], [x])
    causes = {finding.cause for finding in analyze(model, [x]).findings()}
    assert "calls differ" in causes


class Above(nn.Module):
    """Returns the rows whose sum is above a threshold, as a detector does with its boxes."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        return x[x.sum(1) > self.least]


def test_errors_say_what_is_missing() -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(ConfigError, match="nothing in Net is quantized"):
        analyze(Net(), [x])
    with pytest.raises(UnobservedRangeError):
        analyze(tq.quantize(Net().eval(), RULES, x), [x])
    chooses = tq.QWrapper(nn.Linear(4, 4), tq.make_quantizer("affine:8"))
    chooses.observe_weight()
    with pytest.raises(ConfigError, match=r"the float model returns \(0, 4\).*the scores of all boxes"):
        analyze(nn.Sequential(chooses, Above(99.0)), [torch.randn(4, 4)])
    with pytest.raises(ConfigError, match="no batches to analyze"):
        analyze(calibrated(trained(Net()), RULES, pictures()), [])


def layers(weights: list[tq.Quantizer], outputs: list[tq.Quantizer | None]) -> tuple[nn.Module, Tensor]:
    """Return two calibrated linear layers with these quantizers, and a batch."""
    torch.manual_seed(0)
    made = [nn.Linear(8, 16), nn.Linear(16, 4)]
    pairs = zip(made, weights, outputs, strict=True)
    model, x = (
        nn.Sequential(*(tq.QWrapper(layer, weight, output) for layer, weight, output in pairs)),
        torch.randn(8, 8),
    )
    tq.calibrate(model, [x])
    return model, x


def test_sites_that_share_a_quantizer_are_told_apart() -> None:
    weight, output = tq.make_quantizer("affine:8,symmetric=narrow"), tq.make_quantizer("affine:8", "output")
    model, x = layers([weight, weight], [output, output])
    found = analyze(model, [x])
    for path in ("0", "1"):
        expected = sqnr(output_with(model, set(), x), output_with(model, {path}, x))
        assert found.site(path).alone.sqnr_db == pytest.approx(expected, abs=1e-6)
        assert [facts.name for facts in found.site(path).slots] == [f"{path} weight", f"{path} output"]


class Rounds(tq.Quantizer):
    """A quantizer of the published contract, which names no bits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros(()))

    def pre_observe(self, x: Tensor) -> None:
        self.step.copy_(x.detach().abs().max() / 7)

    def quantize(self, x: Tensor) -> Tensor:
        return (x / self.step).round() * self.step

    def post_observe(self, x: Tensor) -> None:
        """Do nothing."""


def test_quantizers_without_bits() -> None:
    model, x = layers([Rounds(), Rounds()], [Rounds(), None])
    found = analyze(model, [x])
    assert [row[-1] for row in found.rows()] == ["w- o-", "w-"]
    assert "None" not in str(found)
    shared = Rounds()
    tied = layers([shared, Rounds()], [None, None])[0]
    tied[1].layer.weight = tied[0].layer.weight
    assert advise(model, [x], found).before == found.whole


def test_values_of_half_precision_have_sums_beyond_its_range() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(8, 4), torch.randn(16, 8)
    with torch.no_grad():
        net.weight *= 1000.0
    rules = [{"weight": "affine:4,symmetric=narrow"}]
    wide, half = calibrated(net, rules, [x]), calibrated(copy.deepcopy(net).half(), rules, [x.half()])
    expected = analyze(wide, [x])
    found = analyze(half, [x.half()])
    assert found.whole.sqnr_db == pytest.approx(expected.whole.sqnr_db, abs=0.1)
    assert found.sites[0].added_db == pytest.approx(expected.sites[0].added_db, abs=0.1)


def test_channels_with_one_number_are_not_dead() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(16, 8)
    model = calibrated(net, [{"weight": "affine:8", "bias": "affine:8", "output": "affine:8"}], [x])
    found = analyze(model, [x[:1]])
    assert {facts.slot for site in found.sites for facts in site.slots} >= {"bias", "output"}
    assert "dead channels" not in {finding.cause for finding in found.findings()}


def test_the_plan_of_the_advice_has_the_remedy_of_an_input() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)
    model = calibrated(net, [{"weight": "affine:8", "input": "affine:3", "output": "affine:8"}], [x])
    found = advise(model, [x], n_sites=1)
    (kept,) = (remedy for remedy in found.kept if remedy.path == "quantize_input_1")
    assert found.plan is not None
    assert [site.input for site in found.plan.sites] == [kept.spec, model.plan.sites[1].input]
    again = found.plan.apply(net)
    tq.calibrate(again, [x])
    assert again.quantize_input_1.quantizers()["output"].n_bits == 8


class Both(nn.Module):
    """Adds two inputs, which have one spec in a plan."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x + y)


def test_a_remedy_that_no_plan_can_have_is_told() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    model = calibrated(Both(), [{"weight": "affine:8", "input": "affine:3", "output": "affine:8"}], [(x, y)])
    with pytest.warns(UserWarning, match="lacks the remedy at quantize_x output"):
        found = advise(model, [(x, y)], n_sites=1)
    assert found.plan == model.plan


class Masked(nn.Module):
    """Never chooses the first class."""

    def __init__(self, low: float) -> None:
        super().__init__()
        self.layer, self.low = nn.Linear(8, 4), low

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).masked_fill(torch.tensor([True, False, False, False]), self.low)


def test_outputs_that_are_infinite_in_both_models_have_no_error() -> None:
    torch.manual_seed(0)
    x, found = torch.randn(16, 8), []
    for low in (0.0, -math.inf):
        torch.manual_seed(0)
        found.append(analyze(calibrated(Masked(low), [{"weight": "affine:4"}], [x]), [x]).whole)
    assert found[1].sqnr_db == found[0].sqnr_db
    broken = EffectSum()
    broken.add(Judge(), torch.ones(2), torch.tensor([1.0, math.nan]), x, None)
    assert broken.effect().sqnr_db == -math.inf


@pytest.mark.parametrize("sqnr_db", [math.inf, -math.inf, 12.5])
def test_every_ratio_is_read_as_it_was_written(sqnr_db: float, analysis: Analysis) -> None:
    facts = replace(analysis.sites[0].slots[0], sqnr_db=sqnr_db)
    effect, site = replace(analysis.whole, sqnr_db=sqnr_db), analysis.sites[0]
    site = replace(site, alone=effect, added_db=sqnr_db, inherited_db=sqnr_db, slots=(facts,))
    whole = replace(analysis, whole=effect, sites=(site,))
    assert Analysis.from_dict(json.loads(json.dumps(whole.to_dict(), allow_nan=False))) == whole


def test_a_tied_weight_gets_the_quantizer_of_the_other_as_it_is() -> None:
    torch.manual_seed(0)
    batch = torch.randint(50, (8, 12))
    rules = [{"weight": "affine:8,symmetric=narrow"}, {"names": ["head"], "weight": "affine:2,symmetric=narrow"}]
    model = calibrated(Tied().eval(), rules, [batch])
    range_observer = model.embedding.weight_quantizers["weight"].observer
    range_observer.force_ranges(-5.0, 5.0)
    found = advise(model, [batch], n_sites=1)
    (remedy,) = (r for r in found.kept if r.change == "the quantizer of embedding weight")
    assert found.plan is not None
    assert found.plan.diff(model.plan)[0].before == remedy.spec == "affine:8,symmetric=narrow"
    with_same = copy.deepcopy(model)
    with_same.head.replace_quantizer("weight", copy.deepcopy(with_same.embedding.weight_quantizers["weight"]))
    assert remedy.after == analyze(with_same, [batch]).whole
