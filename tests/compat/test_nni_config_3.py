"""The config lists of NNI 3.0: every kind of target, granularity and setting, and what is refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compat.nni_nets import ThreeConvs
from torchquant import QModuleState
from torchquant.compat.nni import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, PtqQuantizer, QATQuantizer
from torchquant.compat.nni.granularity import spec_ending
from torchquant.errors import ConfigError, ExportError
from torchquant.utils import qmodules, set_qmodule_state


class Twins(nn.Module):
    """Two inputs, two outputs, a plain parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.register_buffer("shift", torch.linspace(-1.0, 1.0, 6))

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.gain + other, x - other + self.shift


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x, "hidden": 2 * x}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twins, self.named = Twins(), Named()
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.twins(x, other=x + 0.1)
        found = self.named(first + second)
        y, _ = self.lstm((found["logits"] + found["hidden"]).unsqueeze(1))
        return self.norm(y.squeeze(1))


def n_values(x: Tensor) -> int:
    return len(x.detach().flatten().unique())


def seen_at(net: nn.Module, path: str, x: Tensor) -> dict[str, Any]:
    """Run a net; return what a module's own forward is given and returns."""
    seen: dict[str, Any] = {}
    module: Any = net.get_submodule(path)
    module = getattr(module, "op", module)
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        seen["args"], seen["kwargs"] = args, kwargs
        return original(*args, **kwargs)

    module.forward = forward
    handle = net.get_submodule(path).register_forward_hook(lambda m, a, y: seen.update(output=y))
    try:
        net(x)
    finally:
        handle.remove()
        del module.forward
    return seen


def entry(name: str, *targets: str, **given: Any) -> dict[str, Any]:
    return {"op_names": [name], "target_names": list(targets), "quant_dtype": "int3", **given}


def test_any_input_output_parameter_and_buffer() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(64, 6)
    config_list = [
        entry("twins", "_input_1", "_output_1", "gain", "shift"),
        entry("named", "_output_hidden"),
        entry("lstm", "weight_hh_l0"),
    ]
    plain = copy.deepcopy(net)
    quantizer = PtqQuantizer(net, config_list)
    net.eval()(x)
    quantizer.compress()
    seen = seen_at(net, "twins", x)
    assert n_values(seen["args"][0]) == 64 * 6
    assert n_values(seen["kwargs"]["other"]) <= 7
    assert n_values(seen["output"][0]) > 7
    assert n_values(seen["output"][1]) <= 7
    twins: Any = net.twins
    assert not torch.equal(twins.gain, plain.twins.gain)
    assert float((twins.shift - plain.twins.shift).abs().max()) <= 0.5 * 2 / 6 + 1e-6
    named = seen_at(net, "named", x)["output"]
    assert n_values(named["hidden"]) <= 7 < n_values(named["logits"])
    assert set(dict(qmodules(net))["lstm"].quantizers()) == {"weight_hh_l0"}
    config = quantizer.get_calibration_config()
    assert set(config["twins"]) == {"_input_1", "_output_1", "gain", "shift"}
    assert set(config["lstm"]) == {"weight_hh_l0"}
    assert all({"scale", "zero_point"} <= set(numbers) for layer in config.values() for numbers in layer.values())
    with pytest.raises(ExportError, match="quantizers at further inputs or outputs"):
        quantizer.export_model("/nonexistent/x.pth", onnx_path="/nonexistent/x.onnx", input_shape=(1, 6))


def test_such_quantizers_are_saved_train_and_come_off(tmp_path: Any) -> None:
    torch.manual_seed(0)
    config_list = [entry("twins", "_input_other", "_output_0", "gain"), entry("named", "_output_1")]
    net, x = Net(), torch.randn(32, 6)
    plain = copy.deepcopy(net)
    quantizer = QATQuantizer(net, config_list)
    net(x).square().sum().backward()
    gain: Any = net.twins.parametrizations.gain.original
    assert float(gain.grad.abs().max()) > 0
    net.eval()
    expected = net(x)
    again = Net()
    other = QATQuantizer(again, config_list)
    other.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(again.eval()(x), expected)
    set_qmodule_state(net, QModuleState.BYPASSED)
    plain.load_state_dict(quantizer.float_model().state_dict(), strict=True)
    assert torch.equal(net(x), plain.eval()(x))
    released = quantizer.release()
    assert released is net
    assert list(net.state_dict()) == list(plain.state_dict())
    assert torch.equal(net(x), plain(x))


BAD: dict[str, tuple[Any, str]] = {
    "no such argument": (
        entry("twins", "_input_third"),
        r"'twins' \(Twins\) has no '_input_third'; its arguments are x",
    ),
    "no such tensor": (entry("twins", "weight"), r"'twins' \(Twins\) has no 'weight'; .*targets are _input_.*gain"),
    "misspelled": (entry("twins", "gian"), "did you mean 'gain'"),
    "statistics": (
        entry("norm", "running_mean"),
        "'running_mean' of 'norm' cannot be quantized: the batch norm writes",
    ),
    "setting": ({**entry("twins", "gain"), "quant_bits": 8}, "did you mean 'quant_dtype'|key: got 'quant_bits'"),
    "own setting": (
        entry("twins", "gain", target_settings={"gain": {"bits": 8}}),
        "target_settings of 'gain', key: got 'bits'",
    ),
    "method": (entry("twins", "gain", apply_method="round"), "apply_method: got 'round'"),
    "blocks of an input": (entry("twins", "_input_1", granularity=[1, 4]), "an input or output has one scale"),
    "channels of an input": (entry("twins", "_input_1", granularity="in_channel"), "must be default or per_channel"),
    "fuse": (entry("twins", "gain", fuse_names=["norm"]), r"fuse_names must be a list of tuples such as \('conv1'"),
    "fuse nothing": (entry("twins", "gain", fuse_names=[("a", "norm")]), "fuse_names: the model has no module 'a'"),
    "fuse no layer": (entry("twins", "gain", fuse_names=[("named", "norm")]), r"'named' \(Named\) is no layer with a"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_targets_are_refused_in_words(case: str) -> None:
    bad, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        PtqQuantizer(Net(), [bad])


def test_an_output_that_is_not_there() -> None:
    net = Net()
    PtqQuantizer(net, [entry("twins", "_output_5")])
    with pytest.raises(ConfigError, match="Twins has no output '_output_5'; it returns 2 of type tuple"):
        net(torch.randn(4, 6))
    net = Net()
    PtqQuantizer(net, [entry("named", "_output_scores")])
    with pytest.raises(
        ConfigError, match="has no output '_output_scores'; it returns a dictionary with logits, hidden"
    ):
        net(torch.randn(4, 6))


def test_what_stays_float_is_told() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.warns(UserWarning, match="'0' has no bias to quantize"):
        PtqQuantizer(net, [entry("0", "weight", "bias")])
    with pytest.warns(UserWarning, match="'weight' of '0' stays float: its apply_method is bypass"):
        PtqQuantizer(nn.Sequential(nn.Linear(4, 4)), [entry("0", "weight", apply_method="bypass")])
    with pytest.warns(UserWarning, match=r"config_list\[0\] selects no module of the model; op_types \['Conv2d'\]"):
        PtqQuantizer(nn.Sequential(nn.Linear(4, 4)), [{"op_types": ["Conv2d"], "target_names": ["weight"]}])


def test_apply_method_is_the_gradient() -> None:
    for method, expected in (("clamp_round", [1.0, 1.0]), ("qat_clamp_round", [1.0, 0.0])):
        net = nn.Sequential(nn.ReLU())
        quantizer = QATQuantizer(net, [entry("0", "_output_", apply_method=method, quant_dtype="int8")])
        net(torch.tensor([0.0, 1.0]))
        quantizer.load_calibration_config(
            {"0": {"output_bits": 8, "tracked_min_output": 0.0, "tracked_max_output": 1.0}}
        )
        set_qmodule_state(net, QModuleState.QUANT_EVAL)
        x = torch.tensor([0.5, 3.0], requires_grad=True)
        net(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == expected


def test_only_the_named_batch_norms_are_folded() -> None:
    model = ThreeConvs()
    entries = [
        {"op_types": ["Conv2d"], "target_names": ["weight", "_output_"], "fuse_names": [("conv1", "bn1")]},
        {"op_types": ["BatchNorm2d"], "target_names": ["_output_"]},
    ]
    with pytest.warns(UserWarning, match="'bn1' is fused into 'conv1' and quantizes nothing itself; what it returns"):
        quantizer = QATQuantizer(model, entries)
    assert [model.get_submodule(f"conv{i}").fold_mode for i in (1, 2, 3)] == ["running", None, None]
    assert sorted(quantizer.layers) == ["bn2", "bn3", "conv1", "conv2", "conv3"]
    assert type(model.bn1).__name__ == "FusedPart"
    assert type(model.bn2).__name__ == "QOp"


def test_a_layer_its_batch_norm_and_its_activation() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    names = ("0", "1", "2")
    quantizer = QATQuantizer(net, [entry("0", "weight", "_output_", quant_dtype="uint8", fuse_names=[names])])
    x = torch.randn(8, 1, 8, 8)
    for _ in range(3):
        net(x)
    config = quantizer.get_calibration_config()
    assert config["0"]["_output_0"]["tracked_min"] == 0.0
    net.eval()
    with torch.no_grad():
        assert float((net(x) - quantizer.float_model().eval()(x)).abs().max()) < 0.05


def test_targets_that_are_not_named_are_all_of_a_layer() -> None:
    quantizer = PtqQuantizer(nn.Sequential(nn.Linear(4, 4)), [{"op_names": ["0"], "quant_dtype": "int8"}])
    assert sorted(quantizer.layers["0"].targets) == ["bias", "input", "output", "weight"]


W = torch.zeros(8, 6, 3, 3)
ENDINGS: dict[str, tuple[Any, Tensor | None, str]] = {
    "default": ("default", W, ""),
    "out": ("out_channel", W, "/channel"),
    "per": ("per_channel", W, "/channel"),
    "in": ("in_channel", W, "/in_channel"),
    "input": ("per_channel", None, "/channel"),
    "list for an input": ([-1, 1], None, "/channel"),
    "all": ([-1, -1, -1, -1], W, ""),
    "rows": ([1, -1, -1, -1], W, "/channel"),
    "larger than the axis": ([1, 100, 100, 100], W, "/channel"),
    "columns": ([-1, 1, -1, -1], W, "/in_channel"),
    "groups of channels": ([1, 2, -1, -1], W, "/group=18"),
    "of a matrix": ([1, 16], torch.zeros(8, 64), "/group=16"),
    "last axis": ([16], torch.zeros(8, 64), "/group=16"),
    "blocks": ([4, 4], torch.zeros(8, 64), "/block=4x4"),
    "rows of a kernel": ([1, 3], W, "/block=1x1x1x-1"),
    "padded at the back": ([[1], "back", -1], W, "/channel"),
    "padded with -1": ([[-1, 1], "back", -1], W, "/in_channel"),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_granularities(case: str) -> None:
    granularity, tensor, expected = ENDINGS[case]
    assert spec_ending("conv", granularity, tensor) == expected


def test_scales_of_input_channels() -> None:
    """An oracle by hand: each column of the weight has its own largest magnitude."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16))
    weight = net[0].weight.detach() * torch.logspace(-3, 0, 6)
    net[0].weight.data = weight.clone()
    quantizer = PtqQuantizer(net, [entry("0", "weight", granularity="in_channel", quant_dtype="int4")])
    net(torch.randn(4, 6))
    quantizer.compress()
    step = weight.abs().amax(0) / 7
    expected = torch.round(weight / step).clamp(-7, 7) * step
    slot = net[0].weight_slots()[0]
    torch.testing.assert_close(slot.quantizer(slot.seen()), expected)
    torch.testing.assert_close(quantizer.get_calibration_config()["0"]["weight"]["scale"], step)


def test_a_shared_range_wants_equal_settings() -> None:
    net = nn.Sequential(nn.Bilinear(4, 4, 2))
    quantizer = PtqQuantizer(copy.deepcopy(net), [entry("0", "_input_0", "_input_input2")])
    assert list(quantizer.layers["0"].targets) == ["input"]
    own = {"_input_1": {"quant_dtype": "int8"}}
    with pytest.raises(ConfigError, match=r"all inputs of '0' \(Bilinear\) share one range; give '_input_1' the"):
        PtqQuantizer(net, [entry("0", "_input_0", "_input_1", target_settings=own)])


def test_dorefa_quantizes_gradients_when_it_is_asked_to() -> None:
    torch.manual_seed(0)
    x, names = torch.randn(16, 6), {"op_names": ["0"], "target_names": ["weight"]}
    gradients = []
    for bits in (None, 8, 2):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5))
        DoReFaQuantizer(net, [names], gradient_bits=bits)
        net(x).square().sum().backward()
        gradients.append(net[0].bias.grad.clone())
    exact, fine, coarse = gradients
    assert 0 < float((fine - exact).abs().max()) < float((coarse - exact).abs().max())
    assert float((fine - exact).norm() / exact.norm()) < 0.05
    with pytest.raises(ConfigError, match="gradient_bits"):
        DoReFaQuantizer(nn.Sequential(nn.Linear(6, 5)), [names], gradient_bits=0)


def test_bnn_says_that_it_has_one_bit_and_no_scale() -> None:
    with pytest.warns(UserWarning, match="BNNQuantizer quantizes to 1 bit; the quant_dtype int3 is not used"):
        BNNQuantizer(nn.Sequential(nn.Linear(6, 5)), [entry("0", "weight")])
    with pytest.raises(ConfigError, match="granularity must be default. torchquant's scheme xnor has one"):
        BNNQuantizer(
            nn.Sequential(nn.Linear(6, 5)), [entry("0", "weight", quant_dtype=None, granularity="out_channel")]
        )


def test_a_state_set_by_hand_stays() -> None:
    """Analysis and post-training algorithms set states; the quantizer does not undo that."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    plain = copy.deepcopy(net)
    LsqQuantizer(net, [entry("0", "weight", quant_dtype="int2")])
    net(x)
    set_qmodule_state(net.eval(), QModuleState.BYPASSED)
    assert torch.equal(net(x), plain(x))
    set_qmodule_state(net, QModuleState.QUANT_AWARE_TRAIN)
    net(x)
    assert net[0].state is QModuleState.QUANT_EVAL
