"""Rules and plans: who wins, what is refused and how, what a plan costs, that files come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchquant import AffineQuantizer, BatchMinMax, QModuleState, QuantPlan, qmodule_state, quantize, state_report
from torchquant.errors import ConfigError
from torchquant.graph import Site
from torchquant.plan import RULE_SETS


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def fields(rules: Any) -> dict[str, dict[str, Any]]:
    return {site.path: site.words() for site in QuantPlan.from_rules(rules, net()).sites}


def test_later_rules_win_field_by_field() -> None:
    rules = [
        {"types": ["Conv2d", "Linear"], "weight": "affine:8,symmetric=narrow/channel", "output": "affine:8"},
        {"names": ["[03]"], "weight": "lsq:4/channel"},
        {"position": "last", "output": None},
        {"names": "re:.*", "types": ["Conv2d"], "position": ["first"], "input": "affine:8"},
    ]
    assert fields(rules) == {
        "0": {"weight": "lsq:4/channel", "input": "affine:8", "output": "affine:8"},
        "3": {"weight": "lsq:4/channel", "output": "affine:8"},
        "5": {"weight": "affine:8,symmetric=narrow/channel"},
    }


def test_skip_takes_all_back_and_a_later_rule_may_set_again() -> None:
    rules = [
        {"weight": "affine:8", "output": "affine:8"},
        {"names": ["5"], "skip": True},
        {"names": ["0"], "skip": True},
    ]
    assert fields([*rules, {"names": ["0"], "weight": "twn"}]) == {
        "0": {"weight": "twn"},
        "3": {"weight": "affine:8", "output": "affine:8"},
    }


def test_a_fused_activation_sets_the_output_of_its_layer() -> None:
    assert fields([{"types": ["ReLU6"], "output": "affine:4"}]) == {"0": {"output": "affine:4"}}
    assert fields([{"names": ["2"], "output": "affine:4"}]) == {"0": {"output": "affine:4"}}


def test_a_field_is_a_string_a_dictionary_or_a_function() -> None:
    given: list[nn.Module] = []

    def factory(module: nn.Module) -> AffineQuantizer:
        given.append(module)
        return AffineQuantizer(3, BatchMinMax())

    spec = {"scheme": "esb", "n_bits": 4, "granularity": "channel", "k": 1, "gradient": "clipped"}
    rules = [{"weight": spec}, {"names": "0", "weight": factory}]
    plan = QuantPlan.from_rules(rules, net())
    assert plan.sites[1].weight == "esb:4,k=1/channel@clipped"
    model = plan.apply(net())
    assert model[0].weight_quantizer.n_bits == 3
    assert isinstance(given[0], nn.Conv2d)
    assert "<factory>" in str(plan)


def test_where_is_a_function_of_the_site() -> None:
    def is_wide(site: Site) -> bool:
        return isinstance(site.module, nn.Linear) and site.module.in_features > 100

    assert list(fields([{"where": is_wide, "weight": "affine:2"}])) == ["5"]


@pytest.mark.parametrize("name", RULE_SETS)
def test_every_ready_set_makes_a_model_that_runs(name: str) -> None:
    model = quantize(net(), name, image())
    from torchquant import QModuleState, qmodule_state

    with qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN):
        model(image()).sum().backward()
    assert str(model.plan).splitlines()[0].split() == ["site", "what", "weight", "input", "output", "bias"]


BAD: dict[str, tuple[Any, str]] = {
    "set": ("w8a9", r"there is no rule set 'w8a9'; did you mean 'w8a8'\? Known: w8a8, w4a8"),
    "not a list": ({"weight": "affine:8"}, r"rules must be a string or a sequence of mappings"),
    "not a rule": (["affine:8"], r"rules must be a string or a sequence of mappings .*, got \['affine:8'\]"),
    "key": ([{"wieght": "affine:8"}], r"rule 1: no key 'wieght'; did you mean 'weight'\? Allowed: types, names"),
    "type": ([{"types": ["Conv2D"], "weight": "affine:8"}], r"rule 1: no type 'Conv2D'; did you mean 'Conv2d'\?"),
    "type of types": (
        [{"types": 3, "weight": "affine:8"}],
        r"rule 1: types must be a string or a list of strings, got 3",
    ),
    "name": (
        [{"weight": "affine:8"}, {"names": ["fc"], "weight": "affine:4"}],
        r"rule 2 selects no site; Known: 0, 1, 2, 3, 5",
    ),
    "expression": ([{"names": ["re:("], "weight": "affine:4"}], r"rule 1: 're:\(' is not a regular expression"),
    "position": (
        [{"position": "middle", "weight": "affine:8"}],
        r"rule 1: position must be one of first, last, got 'middle'",
    ),
    "where": ([{"where": "conv", "weight": "affine:8"}], r"rule 1: where must be a function of a Site, got 'conv'"),
    "skip": ([{"skip": 1}], r"rule 1: skip must be True or False, got 1"),
    "clash": ([{"skip": True, "weight": "affine:8"}], r"rule 1 contradicts itself: skip leaves .* also sets weight"),
    "nothing": (
        [{"types": ["Conv2d"]}],
        r"rule 1 sets nothing; it must set one of weight, input, output, bias, preactivation, probabilities, fold_bn",
    ),
    "scheme": ([{"weight": "afine:8"}], r"rule 1, weight: no quantizer scheme 'afine'; did you mean 'affine'\?"),
    "width": ([{"weight": "affine:x"}], r"rule 1, weight: spec 'affine:x': the width 'x' is not a whole number"),
    "dictionary": ([{"weight": {"n_bits": 8}}], r"rule 1, weight: a dictionary needs 'scheme', such as 'affine'"),
    "value": ([{"weight": 8}], r"rule 1, weight: expected a spec string such as 'affine:8', a dictionary .* got 8"),
    "fold": ([{"fold_bn": 3}], r"rule 1: fold_bn must be True, False or the name of a mode, got 3"),
    "field": (
        [{"types": ["ReLU6"], "weight": "affine:8"}],
        r"rule 1 sets weight, but site '0' \(Conv2d\) takes output",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rules_are_refused_in_words(case: str) -> None:
    rules, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        QuantPlan.from_rules(rules, net())


def test_a_factory_must_return_a_quantizer() -> None:
    with pytest.raises(ConfigError, match="site '0', weight: a factory must return a Quantizer or None, got 3"):
        quantize(net(), [{"weight": lambda module: 3}])


def test_a_plan_for_another_model_is_refused() -> None:
    plan = QuantPlan.from_rules("w8a8", net())
    with pytest.raises(
        ConfigError, match="the plan has the site '3', but Sequential does not have it;.*made for another model"
    ):
        plan.apply(net()[:3])


def test_a_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    plan = QuantPlan.from_rules("w4a8", net())
    path = plan.save(tmp_path / "plan.yaml")
    loaded = QuantPlan.load(path)
    assert loaded == plan
    assert str(loaded) == str(plan)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]
    path.write_text(path.read_text().partition("left_float")[0])
    with pytest.raises(ConfigError, match=r"plan.yaml seems to be truncated: every saved plan ends with left_float"):
        QuantPlan.load(path)
    path.write_text("torchquant_plan: 1\nsites:\n- path: '0'\n  weight: affine:4\n")  # by hand
    assert [site.weight for site in QuantPlan.load(path).sites] == ["affine:4"]
    with pytest.raises(ConfigError, match="site '0', weight: a function cannot be saved"):
        QuantPlan.from_rules([{"weight": lambda m: None}], net()).save(tmp_path / "other.yaml")
    assert not (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "is not a plan: it must begin with 'torchquant_plan: 1'"),
        ("torchquant_plan: 1\nsite: []", "no key 'site'; did you mean 'sites'"),
        ("torchquant_plan: 1\nsites: [3]", "site 1: expected a mapping with a path, got 3"),
        ("torchquant_plan: 1\nsites: [{path: a, weigth: x}]", "site 1: no key 'weigth'; did you mean 'weight'"),
        ("torchquant_plan: 1\nsites: [{path: a, weight: 'x:8'}]", "site 'a', weight: no quantizer scheme 'x'"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_bad_plan_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        QuantPlan.load(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        QuantPlan.load(tmp_path / "none.yaml")


def test_plans_are_compared_and_changed() -> None:
    plan = QuantPlan.from_rules("w8a8", net())
    other = plan.replace("3", weight="lsq:4/channel", output=None)
    assert str(plan.diff(plan)) == "the plans are the same"
    changes = {(c.field, c.before, c.after) for c in plan.diff(other)}
    assert changes == {("weight", "affine:8,symmetric=narrow/channel", "lsq:4/channel"), ("output", "affine:8", "-")}
    assert "lsq:4/channel" in str(plan.diff(other))
    with pytest.raises(ConfigError, match="no site '4'"):
        plan.replace("4", weight="affine:8")
    with pytest.raises(
        ConfigError,
        match="a site has the slots weight, input, output, bias, preactivation, probabilities, and fold_bn; got wieght",
    ):
        plan.replace("3", wieght="affine:8")
    with pytest.raises(AttributeError):
        plan.sites = ()  # type: ignore[misc]


def test_the_cost_of_a_small_net_by_hand() -> None:
    cost = {site.path: site for site in QuantPlan.from_rules("w4a8", net()).cost(net(), image()[:1])}
    conv = cost["3"]
    assert conv.macs == 8 * 4 * 4 * 4 * 9
    assert (conv.weight_bits, conv.input_bits, conv.output_bits) == (4, 8, 8)
    assert conv.bit_ops == conv.macs * 4 * 8
    assert conv.weight_bytes == 8 * 4 * 9 // 2 + 8 * 4  # codes and a float32 step for each output channel
    assert conv.activation_bytes == 8 * 4 * 4
    assert cost["5"].macs == 8 * 16 * 5
    float_cost = QuantPlan(()).cost(net(), image()[:1])
    assert float_cost.weight_bytes == 4 * (3 * 4 * 9 + 4 * 8 * 9 + 8 * 16 * 5)
    assert float_cost.bit_ops == float_cost.macs * 32 * 32
    assert str(float_cost).splitlines()[-1].startswith("total")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_multiply_adds_are_those_torchinfo_counts(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torchinfo = pytest.importorskip("torchinfo")
    model = getattr(torchvision.models, name)().eval()
    x = torch.randn(1, 3, 64, 64)
    expected = 0
    for layer in torchinfo.summary(model, input_data=x, verbose=0, depth=9).summary_list:
        if isinstance(layer.module, nn.Conv2d | nn.Linear):
            positions = layer.output_size[2] * layer.output_size[3] if isinstance(layer.module, nn.Conv2d) else 1
            bias = 0 if layer.module.bias is None else layer.module.bias.numel() * positions
            expected += layer.macs - bias  # torchinfo counts the bias as another product
    assert QuantPlan(()).cost(model, x).macs == expected


def test_attention_and_matmul_are_counted() -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k) @ k.transpose(-1, -2)

    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4)
    cost = {site.path: site.macs for site in QuantPlan(()).cost(Attention(), (q, k))}
    assert cost == {"attention": 2 * 5 * 7 * 4 * 2, "matmul": 2 * 5 * 7 * 4}


def test_inputs_behind_a_fused_activation_without_a_quantizer_are_quantized() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    model = quantize(net, [{"weight": "affine:8", "input": "affine:8"}], x)
    assert torch.equal(model(x), net(x))
    with qmodule_state(model, QModuleState.CALIBRATION):
        model(x)
    assert sum(row.site != "weight" and row.calibrated for row in state_report(model)) == 2
