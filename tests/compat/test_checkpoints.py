"""Checkpoints of other worlds: each goes in whole, with a map, or not at all, with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchquant import (
    AffineQuantizer,
    BatchMinMax,
    ExpAvgMinMax,
    QModuleState,
    qmodule_state,
    quantize,
    set_qmodule_state,
)
from torchquant.compat import autoqnn
from torchquant.compat.checkpoints import load_checkpoint, save_autoqnn, save_nni
from torchquant.compat.nni import QAT_Quantizer
from torchquant.errors import ConfigError
from torchquant.qmodule import QWrapper


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3))


def image() -> Tensor:
    return torch.randn(2, 1, 8, 8)


def same(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.module."])
def test_a_float_checkpoint_also_in_its_wrappings(wrap: str, tmp_path: Path) -> None:
    source = net()
    state = {wrap + key: value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "float.pth")
    model = quantize(net(), "w8a8")
    key_map = load_checkpoint(model, tmp_path / "float.pth")
    assert same(model, source, image())
    assert [(row.source, row.target) for row in key_map][:2] == [
        ("0.weight", "0.weight"),
        ("0.bias", "0.bias"),
    ]
    assert str(key_map).splitlines()[0].split() == ["checkpoint", "model", "note"]


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source = net()
    safetensors.save_file(source.state_dict(), tmp_path / "float.safetensors")
    model = quantize(net(), "w8a8")
    load_checkpoint(model, tmp_path / "float.safetensors")
    assert same(model, source, image())


def test_timm_and_torchvision_checkpoints() -> None:
    timm = pytest.importorskip("timm")
    source, target = (timm.create_model("mobilenetv3_small_100", pretrained=False) for _ in range(2))
    model = quantize(target, "w8a8")
    load_checkpoint(model, source.state_dict())
    assert same(model, source, torch.randn(1, 3, 64, 64))


def test_our_own_checkpoint_brings_its_ranges() -> None:
    model = quantize(net(), "w8a8")
    with qmodule_state(model, QModuleState.CALIBRATION):
        model(image())
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    other = quantize(net(), "w8a8")
    load_checkpoint(other, model.state_dict())
    x = image()
    assert same(other, model, x)


def published_state(model: nn.Module, renames: dict[str, str]) -> dict[str, Tensor]:
    """What published torchquant would have saved of a calibrated model: uncorrected averages, no states."""
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("_extra_state"):
            continue
        for ours, theirs in renames.items():
            key = key.replace(ours, theirs)
        if key.endswith("observed_weight"):
            if "acts_quantizer" in key:
                state[key.replace("observed_weight", "num_batches_observed")] = torch.tensor(2.0)
            continue
        is_average = "acts_quantizer.observer.range" in key
        state[key] = value * (1.0 - 0.9**2) if is_average else value
    return state


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad(), qmodule_state(model.eval(), QModuleState.CALIBRATION):
        model(x)
        model(0.5 * x)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    return model


def test_published_resnet_checkpoint() -> None:
    torchvision = pytest.importorskip("torchvision")
    from torchquant.models import FusedResNet

    def fused() -> nn.Module:
        float_net = torchvision.models.resnet18(num_classes=4)
        weight, acts = (lambda m: AffineQuantizer(8, BatchMinMax())), (lambda m: AffineQuantizer(8, ExpAvgMinMax()))
        return FusedResNet(float_net, weight, acts, quantize_fc=True)

    x = torch.randn(1, 3, 32, 32)
    model = calibrated(fused(), x)
    renames = {".body.0.": ".fused1.", ".body.1.": ".fused2."}
    state = published_state(model, renames)
    assert "layer1.0.fused1.acts_quantizer.observer.num_batches_observed" in state
    other = fused().eval()
    key_map = load_checkpoint(other, state)
    set_qmodule_state(other, QModuleState.QUANT_EVAL)
    notes = {row.note for row in key_map}
    assert "divided by 1 - 0.9 ** 2" in notes
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), atol=0.05, rtol=0.0)


def test_published_efficientnet_checkpoint() -> None:
    package = pytest.importorskip("efficientnet_pytorch")
    from torchquant.models import FusedEfficientNet

    def fused() -> Any:
        float_net = package.EfficientNet.from_name("efficientnet-b0", num_classes=4)
        weight, acts = (lambda m: AffineQuantizer(8, BatchMinMax())), (lambda m: AffineQuantizer(8, ExpAvgMinMax()))
        return FusedEfficientNet(float_net, weight, acts)

    model, other = fused(), fused()
    wrappers = [path for path, module in model.named_modules() if isinstance(module, QWrapper)]
    state = {}
    for key, value in model.state_dict().items():
        owner, _, name = key.rpartition(".")
        parts = (f"{owner}.layer.{name}" if owner in wrappers and name in ("weight", "bias") else key).split(".")
        key = ".".join(parts)
        if key.endswith(("_extra_state", "observed_weight")) or "range_" in key:
            continue
        if parts[0] == "blocks" and parts[2] == "body":
            last = len(model.blocks[int(parts[1])].body) - 1
            names = ["expand_conv", "depthwise_conv", "", "project_conv"][3 - last :]
            name = names[int(parts[3])]
            key = ".".join([*parts[:2], *([name] if name else []), *parts[4:]])
        state[key] = value
    assert "blocks.1.se_reduce.layer.weight" in state
    load_checkpoint(other, state)
    expected = model.state_dict()
    assert all(
        torch.equal(v, expected[k]) for k, v in other.state_dict().items() if "observ" not in k and "extra" not in k
    )


def test_autoqnn_state_dict() -> None:
    """Its keys: those of the float model, and the buffers of its quantizers."""
    source = net()
    state = dict(source.state_dict())
    for path in ("0", "4"):
        state[f"{path}.weight_quant.alpha"] = torch.tensor(0.3)
        state[f"{path}.act_quant.tensor_maxval"] = torch.tensor(1.0)
    given = {"weight_quant": autoqnn.quantizers.VecQ(4), "act_quant": autoqnn.quantizers.FixedQuantAct(8)}
    model = autoqnn.core.convert(net(), quantize_config_dict=given)
    key_map = load_checkpoint(model, state)
    assert torch.equal(model[0].layer.weight, source[0].weight)
    left = {row.source: row.note for row in key_map if not row.target}
    assert left["0.weight_quant.alpha"] == "measured anew from the weight"
    assert left["4.act_quant.tensor_maxval"] == "starts at an arbitrary number there; calibrate"


def theirs(given: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Make a state dict as AutoQNN writes it: a float one, and the buffers of the quantizers of each layer."""
    state = dict(net().state_dict())
    for path in ("0", "4"):
        for slot, buffers in given.items():
            width = {"float_bitwidth": 4.0, "shadow_bitwidth": 4.0}
            state |= {f"{path}.{slot}.{name}": torch.as_tensor(value) for name, value in (width | buffers).items()}
    return state


def test_autoqnn_evaluation_goes_on_with_its_numbers() -> None:
    """Both formulas are those of its evaluation; there `round(x / alpha - 0.5)` is rounding down."""
    quantizers = autoqnn.quantizers
    state = theirs({"weight_quant": {"delta": 1.0, "alpha": 1.0}, "act_quant": {"alpha": 0.3}, "bias_quant": {}})
    model = autoqnn.core.convert(
        net(), quantize_config_dict={"weight_quant": quantizers.Ternary(), "act_quant": quantizers.ClipQAct(4)}
    )
    key_map = {row.source: row for row in load_checkpoint(model, state)}
    weight = state["0.weight"]
    codes = (weight / (1.4 * weight.abs().mean())).round().clip(-1, 1)
    expected = codes * (codes * weight).sum() / codes.abs().sum()
    torch.testing.assert_close(model[0].weight_quant(weight), expected)
    x = image()
    act = ((x / 0.3).floor().clip(-8, 7) + 0.5) * 0.3
    torch.testing.assert_close(model[0].act_quant(x), act)
    model.eval()
    torch.testing.assert_close(model[0](x), torch.nn.functional.conv2d(act, expected, state.get("0.bias")))
    assert key_map["0.act_quant.alpha"].target == "0.input_quantizer"
    assert key_map["0.weight_quant.alpha"].note == "measured anew from the weight, as there"
    assert key_map["0.bias_quant.float_bitwidth"].note == "quantizes nothing there"


def test_autoqnn_keys_say_where_the_arithmetic_differs() -> None:
    quantizers = autoqnn.quantizers
    state = theirs({"weight_quant": {"alpha": 1.0, "beta": 0.0}, "act_quant": {"alpha": 0.3, "max_exp": 7.0}})
    model = autoqnn.core.convert(
        net(), quantize_config_dict={"weight_quant": quantizers.uL2Q(4), "act_quant": quantizers.PotQAct(4)}
    )
    notes = {row.source: row.note for row in load_checkpoint(model, state)}
    assert notes["4.weight_quant.beta"].startswith("measured anew from the weight; there half a step is lost")
    assert notes["4.act_quant.alpha"] == "there level 1 is missing (docs/algorithms.md I-15); calibrate"
    assert not model[0].act_quant.is_ready


def test_a_learned_width_and_a_class_of_the_user_load_from_autoqnn() -> None:
    class Halves(autoqnn.quantizers.Quantization):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.register_buffer("alpha", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.alpha

    state = theirs({"weight_quant": {"alpha": 0.1}, "act_quant": {"alpha": 0.5}})
    weight = autoqnn.quantizers.VecQ(bitwidth=8, freeze_bitwidth=False)
    model = autoqnn.core.convert(net(), quantize_config_dict={"weight_quant": weight, "act_quant": Halves()})
    load_checkpoint(model, state)
    assert float(model[0].weight_quant.float_bitwidth.detach()) == 4.0
    assert float(model[4].act_quant.alpha) == 0.5


def test_save_autoqnn_writes_its_keys(tmp_path: Path) -> None:
    quantizers = autoqnn.quantizers
    given = {"weight_quant": quantizers.VecQ(4), "act_quant": quantizers.FixedQuantAct(8)}
    model = autoqnn.core.convert(net(), quantize_config_dict=given)
    with pytest.raises(ConfigError, match="0: weight_quant has seen no data, so that it has no numbers to save"):
        save_autoqnn(model, tmp_path / "model.pth")
    model(image())
    key_map = save_autoqnn(model, tmp_path / "model.pth")
    written = torch.load(tmp_path / "model.pth", weights_only=True)
    steps = {"lambdas", "_lamb", "alpha", "re_alpha", "max_quant_val", "min_quant_val"}
    widths = {"float_bitwidth", "shadow_bitwidth"}
    of = {"weight_quant": widths | steps, "bias_quant": widths, "act_quant": widths | {"exponent", "tensor_maxval"}}
    expected = {f"{path}.{slot}.{name}" for path in ("0", "4") for slot, names in of.items() for name in names}
    assert written.keys() == expected | net().state_dict().keys()
    assert float(written["0.act_quant.exponent"]) == float(model[0].act_quant.affine_params().delta.log2())
    notes = {row.target: row.note for row in key_map}
    assert notes["0.weight_quant.alpha"].startswith("there the values are scaled by norms")
    fresh = autoqnn.core.convert(net(), quantize_config_dict=given)
    load_checkpoint(fresh, tmp_path / "model.pth")
    for layer in (model, fresh):
        layer.eval()
    assert torch.equal(fresh[0].weight, model[0].weight)
    low, high = model[0].act_quant.observer.get_ranges()
    assert float(fresh[0].act_quant.observer.get_ranges()[1]) == float(max(-low, high))


def test_what_autoqnn_does_not_have_is_not_saved(tmp_path: Path) -> None:
    given = {"weight_quant": autoqnn.quantizers.VecQ(4, per_channel=True)}
    model = autoqnn.core.convert(nn.Sequential(nn.Linear(3, 3)), quantize_config_dict=given)
    with pytest.raises(ConfigError, match="0: weight_quant: AutoQNN's VecQ has no channels; use per_channel=False"):
        save_autoqnn(model, tmp_path / "model.pth")
    model = autoqnn.core.convert(nn.Sequential(nn.LSTM(3, 3)), quantize_config_dict=given)
    with pytest.raises(ConfigError, match="0: AutoQNN has no quantized LSTM, so that it cannot be saved"):
        save_autoqnn(model, tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == []


CONFIG = [
    {"quant_types": ["weight", "output"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"], "quant_dtype": "uint"},
]


def test_nni_export_goes_into_a_model_and_is_written(tmp_path: Path) -> None:
    model = net()
    quantizer = QAT_Quantizer(model, CONFIG)
    model(image())
    quantizer.export_model(tmp_path / "model.pth", tmp_path / "calibration.pth")
    rules = [{"types": ["Conv2d", "Linear"], "weight": "affine:8", "output": "affine:8"}]
    other = quantize(net(), rules)
    key_map = load_checkpoint(other, tmp_path / "model.pth", tmp_path / "calibration.pth")
    assert "calibration config: 0" in {row.source for row in key_map}
    ours, theirs = (m[0].acts_quantizer.observer.get_ranges() for m in (other, model))
    assert torch.allclose(torch.stack(ours), torch.stack(theirs))
    written = save_nni(other, tmp_path / "again.pth", tmp_path / "again_calibration.pth")
    assert torch.load(tmp_path / "again_calibration.pth", weights_only=True) == written
    assert written["0"]["tracked_max_output"] == pytest.approx(float(theirs[1]))
    plain = net()
    plain.load_state_dict(torch.load(tmp_path / "again.pth", weights_only=True), strict=True)
    back = QAT_Quantizer(plain, CONFIG)
    back.load_calibration_config(written)
    x = image()
    assert same(plain, model, x)


def test_what_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    model = quantize(net(), "w8a8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(3, 3)).state_dict()
    with pytest.raises(
        ConfigError,
        match=r"does not fit this Sequential: it has 1\.wait too much; did you mean '1\.weight'\?; it lacks 1\.num",
    ):
        load_checkpoint(model, {**other, "1.wait": torch.ones(1)})
    wide = {**net().state_dict(), "4.weight": torch.ones(3, 7)}
    with pytest.raises(ConfigError, match=r"4.weight has shape \(3, 7\) there and \(3, 72\) here"):
        load_checkpoint(model, wide)
    with pytest.raises(ConfigError, match="there is no file .*none.pth"):
        load_checkpoint(model, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ConfigError, match="holds no state dict that can be read safely"):
        load_checkpoint(model, tmp_path / "text.pth")
    with pytest.raises(ConfigError, match="a checkpoint must be a state dict of names and tensors, got list"):
        load_checkpoint(model, [1])  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
