"""The state machine: the truth table, contexts, reports, checkpoints."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.errors import ConfigError

S = tq.QModuleState

# Observe weight, observe activations, quantize weight, quantize activations; typed from the design.
TABLE = {
    "BYPASSED": "....",
    "CALIBRATION": "xx..",
    "CALIBRATION_WEIGHT_ONLY": "x...",
    "CALIBRATION_ACT_ONLY": ".x..",
    "QUANT_AWARE_TRAIN": "xxxx",
    "QUANT_AWARE_TRAIN_WEIGHT_ONLY": "x.x.",
    "QUANT_AWARE_TRAIN_ACT_ONLY": ".x.x",
    "QUANT_EVAL": "..xx",
    "QUANT_EVAL_WEIGHT_ONLY": "..x.",
    "QUANT_EVAL_ACT_ONLY": "...x",
}


def model() -> nn.Sequential:
    def wrap(layer: nn.Module) -> tq.QWrapper:
        return tq.QWrapper(
            layer, tq.AffineQuantizer(4, tq.BatchMinMax(0), "narrow"), tq.QfmtQuantizer(8, True, tq.ExpAvgMinMax())
        )

    return nn.Sequential(wrap(nn.Linear(3, 4)), nn.Sequential(wrap(nn.Linear(4, 2))))


def states(module: nn.Module) -> list[str]:
    return [m.state.name for m in module.modules() if isinstance(m, tq.QModule)]


def test_the_ten_states() -> None:
    assert [s.name for s in S] == list(TABLE)
    for state in S:
        flags = (state.is_weight_observed, state.is_act_observed, state.is_weight_quantized, state.is_act_quantized)
        assert "".join("x" if f else "." for f in flags) == TABLE[state.name]


def test_contexts_nest_are_reused_and_survive_exceptions() -> None:
    net = model()
    tq.set_qmodule_state(net[1], S.CALIBRATION)
    before = states(net)
    context = tq.qmodule_state(net, S.QUANT_AWARE_TRAIN)
    for _ in range(2):
        with context, tq.qmodule_state(net, S.BYPASSED):
            assert set(states(net)) == {"BYPASSED"}
            with context:
                assert set(states(net)) == {"QUANT_AWARE_TRAIN"}
        assert states(net) == before
    with pytest.raises(KeyError), context:
        raise KeyError
    assert states(net) == before == ["BYPASSED", "CALIBRATION"]


def test_train_and_eval_do_not_change_the_state() -> None:
    net = model()
    tq.set_qmodule_state(net, S.QUANT_EVAL)
    net.train().eval()
    assert set(states(net)) == {"QUANT_EVAL"}


@pytest.mark.parametrize("call", [tq.set_qmodule_state, tq.qmodule_state])
def test_a_state_must_be_a_state(call: object) -> None:
    with pytest.raises(ConfigError, match="state must be a QModuleState, got 'train'"):
        call(model(), "train")


def test_the_checkpoint_carries_states_and_ranges() -> None:
    trained = model()
    x = torch.randn(8, 3)
    with tq.qmodule_state(trained, S.CALIBRATION):
        trained(x)
    tq.set_qmodule_state(trained, S.QUANT_EVAL)
    tq.set_qmodule_state(trained[1], S.QUANT_EVAL_WEIGHT_ONLY)
    fresh = model()
    fresh.load_state_dict(copy.deepcopy(trained.state_dict()), strict=True)
    assert states(fresh) == ["QUANT_EVAL", "QUANT_EVAL_WEIGHT_ONLY"]
    assert torch.equal(fresh(x), trained(x))


def test_a_saved_state_out_of_the_table_is_refused() -> None:
    op = tq.QOp(abs, None)
    with pytest.raises(ConfigError, match="must be 0..9, got 77"):
        op.load_state_dict({"_extra_state": torch.tensor(77)})


def test_the_report_says_everything_about_each_site() -> None:
    net = model()
    with tq.qmodule_state(net, S.CALIBRATION_WEIGHT_ONLY):
        net(torch.randn(8, 3))
        report = tq.state_report(net)
    assert [(r.path, r.site, r.scheme, r.n_bits, r.calibrated) for r in report] == [
        ("0", "weight", "AffineQuantizer", 4, True),
        ("0", "output", "QfmtQuantizer", 8, False),
        ("1.0", "weight", "AffineQuantizer", 4, True),
        ("1.0", "output", "QfmtQuantizer", 8, False),
    ]
    assert {r.state for r in report} == {"CALIBRATION_WEIGHT_ONLY"}
    assert "(4 channels)" in report[0].ranges
    assert report[1].ranges == "-"
    lines = str(report).splitlines()
    assert len(lines) == 6
    assert lines[0].split() == ["path", "site", "state", "scheme", "n_bits", "calibrated", "ranges"]
    assert json.loads(json.dumps(report.to_dicts()))[0]["path"] == "0"
