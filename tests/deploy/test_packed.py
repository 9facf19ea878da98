"""Packed models: they compute what was saved, they are as small as their codes, and bad files are refused in words."""

from __future__ import annotations

import json
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import torchquant as tq
from torchquant import cli
from torchquant.analysis import layer_errors, weight_bytes
from torchquant.deploy import file_sizes, load_packed, save_packed
from torchquant.deploy.lowering.deploy_form import deploy_form
from torchquant.deploy.packed import contents as packed_contents
from torchquant.deploy.packed import head as packed_head
from torchquant.deploy.packed.references import model_of
from torchquant.errors import ConfigError, ExportError, require
from torchquant.plan import QuantPlan
from torchquant.qmodule import QWeights
from torchquant.quantizers import QUANTIZERS, Quantizer
from torchquant.quantizers_functional.bit_packing import pack_bits, unpack_bits
from torchquant.runs.folder import write_checkpoint
from torchquant.runs.small_resnet import QuantSmallResNet, SmallResNet

safetensors = pytest.importorskip("safetensors.torch")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), width=st.integers(1, 32))
def test_bits_lie_where_the_docstring_says(data: st.DataObject, width: int) -> None:
    """Against one big Python integer whose little-endian bytes they are."""
    numbers = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=37))
    whole = sum(number << i * width for i, number in enumerate(numbers))
    bits = pack_bits(torch.tensor(numbers, dtype=torch.int64), width)
    assert bits.dtype == torch.uint8
    assert bytes(bits.tolist()) == whole.to_bytes(-(-len(numbers) * width // 8), "little")
    assert unpack_bits(bits, width, len(numbers)).tolist() == numbers


def test_packing_takes_any_shape_and_type_and_refuses_what_does_not_fit() -> None:
    codes = torch.arange(24, dtype=torch.uint8).view(2, 3, 4).transpose(0, 2)
    assert unpack_bits(pack_bits(codes, 5), 5, 24).tolist() == codes.flatten().tolist()
    with pytest.raises(ConfigError, match=r"4 bits hold 0..15, got numbers from 0 to 23"):
        pack_bits(codes, 4)
    with pytest.raises(ConfigError, match="got numbers from -1 to 0"):
        pack_bits(torch.tensor([-1, 0]), 4)
    with pytest.raises(ConfigError, match="width must be a whole number from 1 to 32, got 0"):
        pack_bits(codes, 0)
    with pytest.raises(ConfigError, match=r"24 numbers of 5 bits are 15 bytes, got torch.uint8 of shape \(14,\)"):
        unpack_bits(torch.zeros(14, dtype=torch.uint8), 5, 24)


def ready(model: nn.Module, *x: Any) -> nn.Module:
    """Calibrated on x, in QUANT_EVAL."""
    with torch.no_grad(), tq.qmodule_state(model.train(), tq.QModuleState.CALIBRATION):
        model(*x)
    tq.set_qmodule_state(model.eval(), tq.QModuleState.QUANT_EVAL)
    return model


def through_a_file(model: nn.Module, built_again: nn.Module, path: Path, *x: Any) -> nn.Module:
    """The loaded model, after a look at what every loaded model must be."""
    file = save_packed(model, path / "model.safetensors")
    before = {key: value.clone() for key, value in built_again.state_dict().items()}
    loaded = load_packed(file, built_again)
    with torch.no_grad():
        expected, found = (m(*x) for m in (model, loaded))
    expected, found = (y[0] if isinstance(y, tuple) else y for y in (expected, found))
    assert expected.isfinite().all()
    assert torch.equal(found, expected)
    assert not any(m.training for m in loaded.modules())
    assert all(torch.equal(value, before[key]) for key, value in built_again.state_dict().items())
    assert all(value.isfinite().all() for value in loaded.state_dict().values())
    again = save_packed(loaded, path / "again.safetensors")
    assert again.read_bytes() == file.read_bytes()
    return loaded


SCHEMES = [
    pytest.param(name, axis, i, id=f"{name}-{i}-{'tensor' if axis is None else 'channel'}")
    for name in QUANTIZERS
    for axis in (None, 0)
    for i in range(len(QUANTIZERS[name].examples(axis)))
]


@pytest.mark.parametrize(("name", "axis", "i"), SCHEMES)
def test_every_scheme_computes_the_same_bit_for_bit(name: str, axis: int | None, i: int, tmp_path: Path) -> None:
    def build() -> nn.Module:
        def weight() -> Quantizer:
            return QUANTIZERS[name].examples(axis)[i]

        acts = tq.AffineQuantizer(8, tq.ExpAvgMinMax())
        return nn.Sequential(
            tq.QWrapper([nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()], weight(), acts, "running"),
            nn.Flatten(),
            tq.QWrapper(nn.Linear(96, 5), weight(), None),
        )

    x = torch.randn(4, 3, 6, 6)
    model, other = build(), build()
    loaded = through_a_file(ready(model, x), other, tmp_path, x)
    assert torch.equal(
        loaded[2].weight_quantizer.encode(loaded[2].weight), model[2].weight_quantizer.encode(model[2].weight)
    )


@pytest.mark.parametrize(
    "spec",
    [
        *("affine:3,symmetric=narrow/group=16", "nf4/group=7", "affine:12", "affine:16/channel"),
        *("esb:4,k=1/in_channel", "affine:3/block=3x8"),
    ],
)
def test_groups_and_wide_codes(spec: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(tq.QWrapper(nn.Linear(40, 6), tq.make_quantizer(spec), None))

    x = torch.randn(4, 40)
    through_a_file(ready(build(), x), build(), tmp_path, x)


@pytest.mark.parametrize("fold", [False, "running", "batch", "corrected", "rescale"])
@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_layers_batch_norms_and_biases(layer: Callable[[], nn.Module], fold: bool | str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        norm = nn.BatchNorm2d(6)
        nn.init.normal_(norm.weight)
        wrapper = tq.QWrapper(
            [layer(), norm],
            tq.make_quantizer("lsq:4/channel"),
            tq.make_quantizer("lsq:8", "output"),
            fold,
            bias_quantizer=tq.make_quantizer("affine:8"),
        )
        return nn.Sequential(wrapper)

    x = torch.randn(4, 4, 6, 6)
    loaded = through_a_file(ready(build(), x), build(), tmp_path, x)
    values = loaded[0].weight_quantizer.quantize(loaded[0].float_weight())
    torch.testing.assert_close(loaded[0].float_weight(), values)  # unfolded, and folded again


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.LSTM(5, 7, 2, batch_first=True), lambda: torch.randn(2, 4, 5)),
        (lambda: nn.Embedding(20, 6), lambda: torch.arange(20)),
        (lambda: nn.Bilinear(4, 3, 5), lambda: (torch.randn(2, 4), torch.randn(2, 3))),
    ],
)
def test_modules_with_many_weights(layer: Callable[[], nn.Module], x: Callable[[], Any], tmp_path: Path) -> None:
    def build() -> nn.Module:
        made = layer()
        names = [name for name, _ in made.named_parameters() if "weight" in name]
        return QWeights(made, {name: tq.make_quantizer("dorefa:5/channel") for name in names})

    given = x()
    inputs = given if isinstance(given, tuple) else (given,)
    loaded = through_a_file(ready(build(), *inputs), build(), tmp_path, *inputs)
    assert not any(key.startswith("layer.weight") for key in safetensors.load_file(tmp_path / "model.safetensors"))
    assert all(type(q).__name__ == "CodesQuantizer" for q in loaded.weight_quantizers.values())


RULES = ["w8a8", "w4a4-lsq", "ternary"]


@pytest.mark.parametrize("rules", RULES)
def test_a_captured_model_is_rebuilt_from_the_float_one(rules: str, tmp_path: Path) -> None:
    x = torch.randn(4, 1, 16, 16)
    model = ready(tq.quantize(SmallResNet(), rules, x), x)
    loaded = through_a_file(model, SmallResNet(), tmp_path, x)
    assert isinstance(loaded.plan, QuantPlan)
    assert loaded.plan == model.plan
    assert [w.to_dict() for w in weight_bytes(loaded)] == [w.to_dict() for w in weight_bytes(model)]
    assert len(layer_errors(loaded, x)) == len(layer_errors(model, x))


def quant_small(spec: str = "affine:4,symmetric=narrow/channel") -> nn.Module:
    acts = lambda m: tq.AffineQuantizer(8, tq.ExpAvgMinMax())  # noqa: E731
    return QuantSmallResNet(SmallResNet(), lambda m: tq.make_quantizer(spec), acts)


def test_models_built_by_hand(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    x = torch.randn(4, 1, 16, 16)
    through_a_file(ready(quant_small("vecq:4/channel"), x), quant_small("vecq:4/channel"), tmp_path, x)

    def fused() -> nn.Module:
        acts = lambda m: tq.AffineQuantizer(8, tq.ExpAvgMinMax())  # noqa: E731
        net = torchvision.models.resnet18(num_classes=4)
        return tq.models.FusedResNet(net, lambda m: tq.make_quantizer("twn/channel"), acts)

    image = torch.randn(2, 3, 32, 32)
    through_a_file(ready(fused(), image), fused(), tmp_path, image)


def test_a_half_model_and_the_type_of_the_one_given(tmp_path: Path) -> None:
    x = torch.randn(4, 40).bfloat16()
    net = nn.Sequential(nn.Linear(40, 6), nn.Linear(6, 3)).bfloat16()
    model = ready(tq.quantize(net, [{"weight": "affine:4/channel", "output": "affine:8"}]), x)
    through_a_file(model, net, tmp_path, x)
    with pytest.raises(ConfigError, match=r"0.bias is bfloat16 in the file, float32 in the model; use model.to\("):
        load_packed(tmp_path / "model.safetensors", net.float())


class Tied(nn.Module):
    """One parameter read three times: twice quantized, and as a float if asked to."""

    def __init__(self, also_float: bool) -> None:
        super().__init__()
        self.a = tq.QWrapper(nn.Linear(6, 6, bias=False), tq.make_quantizer("affine:4"), None)
        self.b = tq.QWrapper(nn.Linear(6, 6, bias=False), tq.make_quantizer("affine:2/channel"), None)
        self.again = self.a
        self.b.layer.weight = self.a.layer.weight
        self.c = nn.Linear(6, 6, bias=False)
        if also_float:
            self.c.weight = self.a.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.again(self.b(self.a(x))))


def test_a_file_of_0_1_with_the_keys_of_that_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, net = torch.randn(3, 6), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model = ready(tq.quantize(net, "w8a8", x), x)
    now = packed_contents._float_state

    def then(*given: Any) -> dict[str, Tensor]:
        return {key.replace(".bias", ".layer.bias"): value for key, value in now(*given).items()}

    monkeypatch.setattr(packed_contents, "_float_state", then)
    save_packed(model, tmp_path / "model.safetensors")
    assert "0.layer.bias" in safetensors.load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_packed(tmp_path / "model.safetensors", net)(x), model(x))


@pytest.mark.parametrize("also_float", [False, True])
def test_a_tied_weight_is_kept_where_it_is_read_as_a_float(also_float: bool, tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    model = ready(Tied(also_float), x)
    loaded = through_a_file(model, Tied(also_float), tmp_path, x)
    assert loaded.b.layer.weight is loaded.a.layer.weight
    assert torch.equal(loaded.c.weight, model.c.weight)
    assert loaded.a.layer.weight.requires_grad == also_float
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    assert [key for key in stored if key.endswith(".weight")] == ["a.weight" if also_float else "c.weight"]


def test_a_parametrized_weight_keeps_its_parameters(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
        return nn.Sequential(tq.QWrapper(layer, tq.make_quantizer("affine:4"), None))

    x = torch.randn(3, 6)
    through_a_file(ready(build(), x), build(), tmp_path, x)


def test_the_state_when_saved_does_not_matter_and_a_loaded_model_takes_another_file(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    nets = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2)]
    first, second = (ready(tq.quantize(net, [{"weight": "dorefa:4", "output": "affine:8"}]), x) for net in nets)
    with tq.qmodule_state(second, tq.QModuleState.BYPASSED):
        file = save_packed(second, tmp_path / "second.safetensors")
    loaded = through_a_file(first, nets[0], tmp_path, x)
    assert torch.equal(load_packed(file, loaded)(x), second(x))
    assert torch.equal(loaded(x), first(x))


def test_a_loaded_model_is_for_inference(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    model = ready(tq.quantize(net, [{"weight": "lsq:4", "output": "affine:8"}]), x)
    loaded = through_a_file(model, net, tmp_path, x)
    with torch.no_grad(), tq.qmodule_state(loaded, tq.QModuleState.CALIBRATION):
        loaded(100 * x)
    tq.observe_weights(loaded)
    assert torch.equal(loaded[0].weight_quantizer(loaded[0].weight), model[0].weight_quantizer(model[0].weight))
    assert not loaded[0].layer.weight.requires_grad
    with pytest.raises(ConfigError, match=r"a packed model is for inference.*model.eval\(\)"):
        loaded.train()(x)
    whole = load_packed(tmp_path / "model.safetensors", net)
    assert torch.equal(pickle.loads(pickle.dumps(whole))(x), model(x))


def test_a_loaded_model_exports_as_the_saved_one(tmp_path: Path) -> None:
    x = torch.randn(4, 1, 8, 8)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = ready(tq.quantize(net, "w8a8", x), x)
    loaded = through_a_file(model, net, tmp_path, x)
    expected, found = (deploy_form(m).state_dict() for m in (model, loaded))
    assert expected.keys() == found.keys()
    assert any(key.endswith("codes") for key in found)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("spec", ["affine:8/channel", "affine:4/channel", "lsq:3/channel", "ternary:2/channel", "xnor"])
def test_a_file_is_as_small_as_its_codes(spec: str, tmp_path: Path) -> None:
    net = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(4)])
    model = tq.quantize(net, [{"weight": spec}])
    tq.observe_weights(model)
    n_bits = tq.make_quantizer(spec).n_bits
    numbers = sum(t.nbytes for q in model.modules() if isinstance(q, Quantizer) for t in q.state_dict().values())
    size = save_packed(model, tmp_path / "model.safetensors").stat().st_size
    floor = 4 * 512 * 512 * n_bits // 8 + numbers
    assert floor <= size <= 1.02 * floor + 2048


@pytest.mark.parametrize(("spec", "bits"), [("mxfp4", 4 + 8 / 32), ("mxfp8_e4m3", 8 + 8 / 32), ("nvfp4", 4 + 7 / 16)])
def test_the_scale_of_a_block_is_stored_once(spec: str, bits: float, tmp_path: Path) -> None:
    net = nn.Linear(1000, 128, bias=False)  # the last block of a row is not full
    model = tq.quantize(net, [{"weight": spec}])
    tq.observe_weights(model)
    size = save_packed(model, tmp_path / "model.safetensors").stat().st_size
    assert size <= 1.01 * 128 * 1000 * bits / 8 + 1500
    loaded = load_packed(tmp_path / "model.safetensors", net)
    assert torch.equal(loaded.weight_quantizer.codes, model.weight_quantizer.encode(model.layer.weight))


def own_file(folder: Path) -> str:
    path = folder / "mine.py"
    path.write_text("from torch import nn\ndef net(width=3):\n    return nn.Sequential(nn.Linear(4, width))\nn = 3\n")
    return f"{path}:net"


@pytest.mark.parametrize("arguments", [{}, {"width": 5}])
def test_a_file_that_says_who_builds_its_model_needs_nothing_else(arguments: dict[str, Any], tmp_path: Path) -> None:
    reference = own_file(tmp_path)
    x = torch.randn(2, 4)
    model = ready(tq.quantize(model_of(reference, **arguments), [{"weight": "affine:4", "output": "affine:8"}]), x)
    file = save_packed(model, tmp_path / "m.safetensors", (reference, arguments))
    assert torch.equal(load_packed(file)(x), model(x))
    ready(quant := quant_small(), image := torch.randn(2, 1, 16, 16))
    file = save_packed(quant, tmp_path / "q.safetensors", f"{__name__}:quant_small")
    assert torch.equal(load_packed(file)(image), quant(image))


def test_with_a_model_nothing_is_imported(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    model = tq.quantize(net, [{"weight": "affine:4"}])
    tq.observe_weights(model)
    trap = tmp_path / "trap.py"
    trap.write_text("raise AssertionError('was run')\n")
    file = save_packed(model, tmp_path / "m.safetensors", f"{trap}:net")
    load_packed(file, net)
    with pytest.raises(AssertionError, match="was run"):
        load_packed(file)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("no_colon", "expected 'package.module:function' or 'path/to/file.py:function', got 'no_colon'"),
        (("torch.nn:Linear", {"a": object()}), "the arguments of torch.nn:Linear must be plain JSON data"),
    ],
)
def test_a_bad_build_is_refused_before_the_file_is_written(build: Any, message: str, tmp_path: Path) -> None:
    model = tq.quantize(nn.Sequential(nn.Linear(4, 3)), [{"weight": "affine:4"}])
    tq.observe_weights(model)
    with pytest.raises(ConfigError, match=message):
        save_packed(model, tmp_path / "m.safetensors", build)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (None, "does not name a function that builds its model"),
        ("nowhere.py:net", "there is no file nowhere.py"),
        ("torch.nowhere:net", "No module named 'torch.nowhere'"),
        ("{own}:large", "has no function 'large'; it has net"),
        ("{own}:n", "has no function 'n'"),
        (
            ("torch.nn:Linear", {"in_features": 4, "out_features": 9}),
            "the plan has the site '0', but Linear does not have it",
        ),
    ],
)
def test_a_build_that_builds_something_else(build: Any, message: str, tmp_path: Path) -> None:
    model = tq.quantize(nn.Sequential(nn.Linear(4, 3)), [{"weight": "affine:4"}])
    tq.observe_weights(model)
    if isinstance(build, str):
        build = build.format(own=own_file(tmp_path).rpartition(":")[0])
    with pytest.raises(ConfigError, match=message):
        load_packed(save_packed(model, tmp_path / "m.safetensors", build))


class NoCodes(Quantizer):
    n_bits = 2

    def quantize(self, x: Tensor) -> Tensor:
        return x.round()


class WrongCodes(NoCodes):
    code_range = (-2, 1)

    def encode(self, x: Tensor) -> Tensor:
        return x.round().clamp(-2, 1).to(torch.int32)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype) + 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear has no QModule, so nothing in it is quantized"),
        (
            nn.Sequential(tq.QWrapper(nn.Linear(2, 2), tq.make_quantizer("affine:4"), None)),
            r"0.weight: the quantizer \(AffineQuantizer\) has seen no data",
        ),
        (
            nn.Sequential(tq.QWrapper(nn.Linear(2, 2), NoCodes(), None)),
            r"0.weight: the quantizer \(NoCodes\) cannot be packed: .*write encode",
        ),
        (
            nn.Sequential(tq.QWrapper(nn.Linear(2, 2), WrongCodes(), None)),
            r"0.weight: .*decode\(encode\(weight\)\) differs from quantize\(weight\)",
        ),
    ],
)
def test_what_cannot_be_packed_is_named(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        save_packed(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_weight_with_nan_is_named(tmp_path: Path) -> None:
    model = tq.quantize(nn.Sequential(nn.Linear(2, 2)), [{"weight": "affine:4"}])
    tq.observe_weights(model)
    with torch.no_grad():
        model[0].layer.weight[0, 0] = torch.nan
    with pytest.raises(ExportError, match="0.weight: .*cannot encode NaN"):
        save_packed(model, tmp_path / "m.safetensors")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = tq.quantize(nn.Sequential(nn.Linear(4, 3)), [{"weight": "affine:4", "output": "affine:8"}])
    return save_packed(ready(model, torch.randn(8, 4)), tmp_path / "model.safetensors")


def rewrite(file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change what the file holds, with a checksum that fits."""
    with require("safetensors", "deploy").safe_open(file, "pt") as opened:
        tensors, said = (
            {k: opened.get_tensor(k) for k in opened.keys()},  # noqa: SIM118
            json.loads(opened.metadata()[packed_head.FORMAT]),
        )
    del said["crc32"]
    change(tensors, said)
    said["crc32"] = packed_head._checksum(tensors, said)
    safetensors.save_file(tensors, file, {packed_head.FORMAT: json.dumps(said)})


def no_change(tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    """So that a refusal of the others is of what they changed."""


def test_a_rewritten_file_loads(file: Path) -> None:
    rewrite(file, no_change)
    load_packed(file, nn.Sequential(nn.Linear(4, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, s: s.update(version=2, torchquant="9.9"),
            "version 2 of the packed format, written by torchquant 9.9",
        ),
        (lambda t, s: s.update(other=1), "no key 'other'"),
        (lambda t, s: t.pop("0.bias"), "1 key only in the model: 0.bias"),
        (lambda t, s: t.update(extra=torch.ones(1)), "1 key only in the file: extra"),
        (lambda t, s: t.pop("0.weight.codes"), r"0.weight: .*are 6 bytes, got .*\(0,\)"),
        (lambda t, s: t.update({"0.weight.codes": torch.zeros(5, dtype=torch.uint8)}), r"are 6 bytes, got .*\(5,\)"),
        (lambda t, s: s.pop("weights"), "1 quantized weight only in the model: 0.weight"),
        (lambda t, s: s["weights"].update(other=s["weights"]["0.weight"]), "only in the file: other"),
        (
            lambda t, s: s["weights"]["0.weight"].__setitem__(3, 5),
            "0.weight: its codes have 5 bits from 0 on; codes of",
        ),
        (
            lambda t, s: s.update(weights={"0.weight": "x"}),
            r"0.weight must be \[shape, type, low, width, shared width\], got 'x'",
        ),
        (lambda t, s: s["plan"].update(torchquant_plan=9), "the plan in .* is a plan of a newer version"),
    ],
)
def test_a_changed_file_is_refused(change: Callable[..., object], message: str, file: Path) -> None:
    rewrite(file, change)
    with pytest.raises(ConfigError, match=message):
        load_packed(file, nn.Sequential(nn.Linear(4, 3)))


def test_every_flipped_bit_and_every_cut_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ConfigError):
            load_packed(file, nn.Sequential(nn.Linear(4, 3)))
    for length in range(0, len(whole), 61):
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="is not a complete safetensors file"):
            load_packed(file, nn.Sequential(nn.Linear(4, 3)))


class Bomb:
    def __reduce__(self) -> Any:
        return operator.truediv, (1, 0)


def test_foreign_files_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    files = {"empty": b"", "text": b"hello", "pickle": pickle.dumps(Bomb())}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} is not a complete safetensors file"):
            load_packed(tmp_path / name, nn.Linear(2, 2))
    safetensors.save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"but not a packed model: .*compat.checkpoints.load_checkpoint"):
        load_packed(tmp_path / "other.safetensors", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="there is no file .*none"):
        load_packed(tmp_path / "none", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="there is no file"):
        load_packed(tmp_path, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 9)),
            "0.weight is float32 of shape .3, 4. there, float32 of shape .9, 4. here|size",
        ),
        (nn.Sequential(nn.Linear(4, 3, bias=False)), "1 key only in the file: 0.bias"),
        (nn.Linear(4, 3), "the plan has the site '0', but Linear does not have it"),
        (
            tq.quantize(nn.Sequential(nn.Linear(4, 3)), [{"weight": "affine:2", "output": "affine:8"}]),
            "have 4 bits from 0",
        ),
        (tq.quantize(nn.Sequential(nn.Linear(4, 3)), [{"output": "affine:8"}]), "weight only in the file: 0.weight"),
    ],
)
def test_another_model_is_refused(given: nn.Module, message: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_packed(file, given)


def test_without_a_plan_the_quantized_model_is_asked_for(tmp_path: Path) -> None:
    rules = [{"weight": lambda layer: tq.make_quantizer("affine:4")}]
    model = tq.quantize(nn.Sequential(nn.Linear(4, 3)), rules)
    tq.observe_weights(model)
    file = save_packed(model, tmp_path / "m.safetensors")
    with pytest.raises(
        ConfigError, match="has no plan, so it is loaded into the quantized model.*got a float Sequential"
    ):
        load_packed(file, nn.Sequential(nn.Linear(4, 3)))
    x = torch.randn(2, 4)
    tq.set_qmodule_state(model.eval(), tq.QModuleState.QUANT_EVAL)
    assert torch.equal(load_packed(file, tq.quantize(nn.Sequential(nn.Linear(4, 3)), rules))(x), model(x))


def test_a_stopped_write_leaves_the_former_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    before = file.read_bytes()
    monkeypatch.setattr(safetensors, "save_file", stop)
    model = tq.quantize(nn.Sequential(nn.Linear(4, 3)), [{"weight": "affine:4"}])
    tq.observe_weights(model)
    with pytest.raises(KeyboardInterrupt):
        save_packed(model, file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def run_folder(folder: Path) -> Path:
    """A folder as a run leaves it."""
    net = nn.Sequential(nn.Linear(64, 64))
    model = tq.quantize(net, [{"weight": "affine:4"}])
    tq.observe_weights(model)
    folder.mkdir()
    write_checkpoint(folder / "float.pt", net)
    write_checkpoint(folder / "quantized.pt", model)
    torch.save({"model": net.state_dict(), "epoch": 3}, folder / "float.progress.pt")
    save_packed(model, folder / "quantized.safetensors")
    safetensors.save_file(net.state_dict(), folder / "float.safetensors")
    (folder / "model.onnx").write_bytes(bytes(1000))
    (folder / "result.json").write_text("{}")
    return folder


def test_sizes_of_a_folder_and_of_files(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "out")
    sizes = file_sizes([folder])
    assert {Path(size.path).name: size.kind for size in sizes} == {
        "float.progress.pt": "other checkpoint",
        "float.pt": "float checkpoint",
        "float.safetensors": "float checkpoint",
        "model.onnx": "ONNX",
        "quantized.pt": "quantized checkpoint",
        "quantized.safetensors": "packed",
    }
    by_name = {Path(size.path).name: size for size in sizes}
    n_float = (folder / "float.pt").stat().st_size
    assert by_name["model.onnx"].ratio == 1000 / n_float
    assert by_name["quantized.safetensors"].bytes < n_float / 3
    assert file_sizes([folder / "model.onnx"])[0].ratio is None
    assert file_sizes([folder / "model.onnx", folder / "float.pt"])[0].ratio == 1000 / n_float
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.onnx").write_bytes(bytes(10))
    assert file_sizes([other, folder])[0].ratio == 10 / n_float
    write_checkpoint(other / "float.pt", nn.Linear(1, 1))
    assert [size.ratio for size in file_sizes([folder, other]) if size.kind == "float checkpoint"].count(1.0) == 2
    assert str(sizes).splitlines()[0].split() == ["path", "kind", "bytes", "of", "float"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.pt", "there is no file"),
        ("readme.txt", "is not a model file; expected a folder"),
        ("", "has no model files"),
    ],
)
def test_sizes_of_what_is_no_model(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ConfigError, match=message):
        file_sizes([tmp_path / name])


def test_the_command_shows_a_table_and_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "out")
    wide = {"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"}
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(cli.build_app(), ["size", str(folder)], env=wide)
    assert done.exit_code == 0, done.output
    assert "quantized.safetensors" in done.output
    assert "100.0%" in done.output
    assert sorted(tmp_path.rglob("*")) == before
    table, csv = tmp_path / "sizes.json", tmp_path / "sizes.csv"
    done = CliRunner().invoke(cli.build_app(), ["size", str(folder), "--json", str(table), "--csv", str(csv)], env=wide)
    assert done.exit_code == 0, done.output
    assert json.loads(table.read_text()) == file_sizes([folder]).to_dicts()
    assert csv.read_text().splitlines()[0] == "path,kind,bytes,ratio"
    assert len(csv.read_text().splitlines()) == 7
    bad = CliRunner().invoke(cli.build_app(), ["size", str(tmp_path / "none.pt")])
    assert bad.exit_code == 1
    assert "there is no file" in bad.output
