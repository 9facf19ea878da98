"""A weight that several layers have in common is counted and stored once; costs are those of one sample."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import torchquant as tq
from torchquant import QModuleState as S
from torchquant import QuantPlan
from torchquant.analysis import weight_bytes
from torchquant.deploy import load_packed, save_packed
from torchquant.deploy.packed.reading import read_safetensors
from torchquant.graph.cost import samples_in
from torchquant.search import CostModel, search_rules


class Language(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens)))


def tokens(batch=4):
    return torch.randint(50, (batch, 7), generator=torch.Generator().manual_seed(0))


def plan_of(net, table="affine:8/channel", head="affine:8/channel"):
    rules = [{"names": ["table"], "weight": table}, {"names": ["head"], "weight": head, "output": "affine:8"}]
    return QuantPlan.from_rules(rules, net, tokens())


@pytest.mark.parametrize("spec", ["affine:8/channel", "affine:4", None])
def test_a_tied_table_is_counted_once(spec):
    tied, untied = (plan_of(net, spec, spec).cost(net, tokens()) for net in (Language(), Language(False)))
    assert 2 * tied.weight_bytes == untied.weight_bytes
    by_path = {site.path: site for site in tied}
    assert (by_path["head"].weight_bytes, by_path["head"].shared_with) == (0, "table")
    assert by_path["head"].macs == 7 * 50 * 8
    assert "head: its weight is that of table, counted there" in str(tied)
    assert not any(site.shared_with for site in untied)
    assert "counted there" not in str(untied)


def test_a_tied_table_under_two_specs_is_two_tables():
    cost = plan_of(Language(), "affine:8", "affine:4").cost(Language(), tokens())
    assert not any(site.shared_with for site in cost)
    assert cost.weight_bytes == 50 * 8 + 50 * 4 + 2 * 5


@pytest.mark.parametrize("head", ["affine:4", ["affine:2", "affine:4", "affine:8"]])
def test_a_search_counts_as_the_plan_does(head):
    net = Language()
    rules = [{"names": ["table"], "weight": ["affine:4", "affine:8"]}, {"names": ["head"], "weight": head}]
    plan = QuantPlan.from_rules(search_rules(rules), net, tokens())
    costs = CostModel(net, plan, tokens())
    options = {v.point: len(v.options) for v in costs.variables}
    for i in range(options["table", "weight"]):
        for j in range(options.get(("head", "weight"), 1)):
            choice = {("table", "weight"): i, ("head", "weight"): j}
            choice = {place: option for place, option in choice.items() if place in options}
            exact = costs.plan_of(plan, choice).cost(net, tokens())
            shares = {p: torch.eye(options[p], dtype=torch.float64)[o] for p, o in choice.items()}
            for found in (costs.totals(choice), costs.expected(shares)):
                assert (found["bytes"], found["bitops"]) == (exact.weight_bytes, exact.bit_ops)
    shares = {p: torch.full((n,), 1 / n, dtype=torch.float64, requires_grad=True) for p, n in options.items()}
    costs.expected(shares)["bytes"].backward()
    assert all(share.grad is not None for share in shares.values())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_costs_are_of_one_sample(batch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2)).eval()
    plan = QuantPlan.from_rules("w8a8", net, torch.randn(1, 3, 6, 6))
    cost, one = (plan.cost(net, torch.randn(n, 3, 6, 6)) for n in (batch, 1))
    assert cost == one
    assert [site.macs for site in cost] == [4 * 16 * 27, 64 * 2]
    assert cost.activation_bytes == 4 * 16 + 2
    searched = QuantPlan.from_rules(search_rules([{"weight": "affine:{n}"}]), net)
    costs = CostModel(net, searched, torch.randn(batch, 3, 6, 6))
    assert costs.totals(dict.fromkeys(costs.points, 0))["act_bytes"] == 4 * (4 * 16 + 2)


def test_what_is_taken_for_the_batch():
    packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 4, 1]))
    assert samples_in(packed) == samples_in((packed,)) == 3
    assert samples_in({"image": torch.zeros(6, 3, 8, 8), "mask": torch.zeros(2)}) == 6
    assert samples_in(torch.zeros(9, dtype=torch.long)) == 9  # nine words for an Embedding
    assert samples_in(torch.zeros(9)) == samples_in(torch.zeros(())) == samples_in(None) == 1  # one row of features
    assert samples_in((None, [torch.zeros(4, 2)])) == 4


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_every_layer_of_a_recurrent_module_is_counted():
    net = nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True, proj_size=3)
    sizes = {name: weight.numel() for name, weight in net.named_parameters() if "weight" in name}
    plan = QuantPlan.from_rules([{"weight": "affine:4", "input": "affine:8"}], net, torch.randn(2, 7, 5))
    (cost,) = plan.cost(net, torch.randn(2, 7, 5))
    first = sizes["weight_ih_l0"] + sizes["weight_ih_l0_reverse"]
    every = sum(sizes.values())
    assert cost.macs == 7 * every
    assert cost.bit_ops == 7 * (4 * 8 * first + 4 * 32 * (every - first))  # what the layers hand on is float
    assert cost.weight_bytes == sum(-(-n * 4 // 8) + 5 for n in sizes.values())


def test_inside_an_attention_is_float():
    net, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    plan = QuantPlan.from_rules([{"weight": "affine:8", "input": "affine:8"}], net, (x, x, x))
    (cost,) = plan.cost(net, (x, x, x))
    projected, inner, floats = 3 * 5 * 8 * 8, 5 * 8 * 8, 2 * 5 * 5 * 8
    assert cost.macs == projected + inner + floats
    assert cost.bit_ops == 64 * projected + 8 * 32 * inner + 32 * 32 * floats


def calibrated(net, rules="w8a8"):
    model = tq.quantize(net.eval(), rules, tokens())
    with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
        model(tokens())
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    return model


def test_footprints_count_a_tied_table_once():
    tied, untied = (calibrated(Language(tied)) for tied in (True, False))
    assert [site.total for site in weight_bytes(tied)] == [weight_bytes(untied)[0].total, 0]
    assert [site.total for site in weight_bytes(Language())] == [50 * 8 * 4, 0]
    tied.head.weight_quantizer.observer.force_ranges(torch.full((50,), -1.0), torch.full((50,), 1.0))
    assert weight_bytes(tied)[1].total == weight_bytes(untied)[1].total


@pytest.mark.parametrize("rules", ["w8a8", [{"weight": "affine:3/channel"}], [{"weight": "lsq:4/channel"}]])
def test_a_tied_table_is_packed_once(rules, tmp_path):
    pytest.importorskip("safetensors")
    net = Language()
    model, untied = calibrated(net, rules), calibrated(Language(False), rules)
    file = save_packed(model, tmp_path / "tied.safetensors")
    stored = read_safetensors(file)[0]
    assert [key for key in stored if key.endswith(".codes")] == ["table.weight.codes"]
    assert not any(key.startswith("head.weight_quantizer") for key in stored)
    assert len(stored) < len(read_safetensors(save_packed(untied, tmp_path / "untied.safetensors"))[0])
    loaded = load_packed(file, net)
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert loaded.head.layer.weight is loaded.table.layer.weight
    assert loaded.head.weight_quantizer.codes.data_ptr() == loaded.table.weight_quantizers["weight"].codes.data_ptr()
    again = save_packed(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == file.read_bytes()
    apart = load_packed(file, Language(False))  # a model that is not tied takes the numbers too
    assert torch.equal(apart(tokens()), model(tokens()))


def test_a_tied_table_with_other_numbers_is_packed_twice(tmp_path):
    pytest.importorskip("safetensors")
    net = Language()
    model = calibrated(net)
    model.head.weight_quantizer.observer.force_ranges(torch.full((50,), -1.0), torch.full((50,), 1.0))
    file = save_packed(model, tmp_path / "tied.safetensors")
    assert {"table.weight.codes", "head.weight.codes"} <= read_safetensors(file)[0].keys()
    assert torch.equal(load_packed(file, net)(tokens()), model(tokens()))


def test_files_without_ties_are_those_of_before(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    file = save_packed(calibrated(Language(False)), tmp_path / "untied.safetensors")
    with safetensors.safe_open(file, framework="pt") as opened:
        said = json.loads(opened.metadata()["torchquant-packed"])
    assert set(said) == {"version", "torchquant", "weights", "plan", "build", "crc32"}
