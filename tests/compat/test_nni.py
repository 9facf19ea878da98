"""The NNI dialect: the blocks of its document, the semantics of its config lists, what it exports."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant.compat.nni as nni
from tests import DATA
from torchquant import QModuleState, QWrapper
from torchquant.compat.nni import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    PtqQuantizer,
    QAT_Quantizer,
    TorchEvaluator,
    reset_quant_scheme_dtype,
    set_quant_scheme_dtype,
)
from torchquant.compat.nni.config import Target
from torchquant.errors import ConfigError
from torchquant.qmodule.fused_part import FusedPart
from torchquant.utils import qmodules


@pytest.fixture(autouse=True)
def _fresh_defaults() -> Any:
    reset_quant_scheme_dtype()
    yield
    reset_quant_scheme_dtype()


class Mnist(nn.Module):
    """The network of NNI's examples, smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(4, 6, 5)
        self.relu2 = nn.ReLU6()
        self.fc = nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu1(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(self.relu2(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


def digits(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 28, 28)


class VGG_Cifar10(nn.Module):  # noqa: N801 - the document's name
    """The modules that the document's list of names speaks of, at the positions it says."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, kind in enumerate("cbhcbphcbhcbphcbhcbph"[:21]):
            n_in = 3 if i == 0 else 4
            layers.append(
                {
                    "c": lambda n=n_in: nn.Conv2d(n, 4, 3, padding=1, bias=False),
                    "b": lambda: nn.BatchNorm2d(4),
                    "h": nn.Hardtanh,
                    "p": lambda: nn.MaxPool2d(2),
                }[kind]()
            )
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            *(
                nn.Linear(64, 16),
                nn.BatchNorm1d(16),
                nn.Hardtanh(),
                nn.Linear(16, 16),
                nn.BatchNorm1d(16),
                nn.Hardtanh(),
            ),
            nn.Linear(16, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def blocks() -> list[str]:
    """The code blocks of NNI's document on quantization, its words about them left out."""
    text = (DATA / "nni_blocks.txt").read_text(encoding="utf-8")
    return [textwrap.dedent(block).strip() for block in text.split("\n----\n")]


NAMES = {
    "Mnist": Mnist,
    "VGG_Cifar10": VGG_Cifar10,
    "torch": torch,
}


def run(block: str, **more: Any) -> dict[str, Any]:
    """Run a block with only its import changed."""
    code = block.replace("from nni.", "from torchquant.compat.nni.")
    if "nni." in code and "import" not in code:
        code = "import torchquant.compat.nni as nni\n" + code
    scope = {**NAMES, **more}
    exec(compile(code, "<document>", "exec"), scope)
    return scope


def test_block_naive() -> None:
    model = run(blocks()[0], model=Mnist())["model"]
    model(digits())
    assert isinstance(model.fc, QWrapper)


def test_block_qat() -> None:
    scope = run(blocks()[1])
    model = scope["model"]
    model(digits()).sum().backward()
    assert (model.conv1.state, model.relu1.state) == (QModuleState.QUANT_AWARE_TRAIN, QModuleState.CALIBRATION)


def test_block_folding() -> None:
    config_list = [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"]}]
    scope = run(blocks()[2], QAT_Quantizer=QAT_Quantizer, model=Mnist(), config_list=config_list)
    model = scope["quantizer"].compress()
    assert model.conv1.fold_mode == "running"
    assert isinstance(model.bn1, FusedPart)
    assert model.conv2.fold_mode is None


def test_block_schemes() -> None:
    run(blocks()[3])
    scope = run(blocks()[4])
    assert scope["config_list"][0]["quant_scheme"] == "per_channel_symmetric"
    model = QAT_Quantizer(Mnist(), scope["config_list"]).compress()
    assert model.conv1.weight_quantizer.axis == 0
    assert model.conv1.weight_quantizer.symmetric == "narrow"


def test_block_distributed(tmp_path: Path) -> None:
    """As the document shows: the quantizer first, then DistributedDataParallel, then training."""
    dist = torch.distributed
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    params = {"config_list": [{"quant_types": ["weight", "output"], "quant_bits": 8, "op_types": ["default"]}]}
    modes: list[bool] = []

    def train(model: nn.Module) -> None:
        modes.append(model.train().training)
        model(digits()).sum().backward()

    def evaluate(model: nn.Module) -> None:
        modes.append(model.eval().training)
        model(digits())

    try:
        scope = run(blocks()[5], define_your_model=Mnist, other_params=params, epochs=2, train=train, eval=evaluate)
        assert modes == [True, False, True, False]
        assert scope["model"].module.bound_model.fc.layer.weight.grad is not None
    finally:
        dist.destroy_process_group()


def test_data_parallel() -> None:
    quantizer = QAT_Quantizer(Mnist(), [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"]}])
    nn.DataParallel(quantizer)(digits()).sum().backward()
    with pytest.raises(ConfigError, match="the model must not be wrapped, got a DataParallel; give the inner one"):
        QAT_Quantizer(nn.DataParallel(Mnist()), [])


def test_block_lsq() -> None:
    model = Mnist()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scope = run(blocks()[6].replace("model = Mnist()\n", ""), model=model, optimizer=optimizer)
    assert len(optimizer.param_groups) == 2
    model(digits()).sum().backward()
    step = model.conv1.weight_quantizer.step
    before = step.detach().clone()
    optimizer.step()
    assert not torch.equal(step, before)
    assert int(scope["quantizer"].steps) == 2


def test_block_dorefa() -> None:
    model = Mnist()
    run(blocks()[7], model=model)
    model(digits()).sum().backward()
    assert type(model.conv1.weight_quantizer).__name__ == "DoReFaQuantizer"


def test_block_bnn() -> None:
    model = run(blocks()[8])["model"]
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert float(model.features[0].layer.weight.detach().abs().max()) <= 1.0
    quantized = model.features[0].weight_quantizer(model.features[0].layer.weight)
    assert quantized.unique().tolist() == [-1.0, 1.0]
    outputs = [path for path, module in qmodules(model) if "output" in module.quantizers()]
    assert outputs == [
        *("features.6", "features.9", "features.13", "features.16", "features.20", "classifier.2", "classifier.5")
    ]


def test_block_observer() -> None:
    loader = [(digits(), torch.zeros(3)) for _ in range(2)]
    model = run(blocks()[9], calib_loader=loader)["model"]
    assert model.conv1.state is QModuleState.QUANT_EVAL
    assert model.relu1.acts_quantizer.n_bits == 7
    before = model.relu1.acts_quantizer.observer.get_ranges()
    model(10 * digits())
    assert model.relu1.acts_quantizer.observer.get_ranges() == before


def test_reference_values_of_scale_and_zero_point() -> None:
    """Weights 1..18, docs/algorithms.md D4."""
    expected = {
        ("int", True): (18 / 127, 0),
        ("uint", True): (18 / 127.5, 128),  # NNI 3.0's zero point; 2.x stores 127
        ("int", False): (18 / 254, -127),
        ("uint", False): (18 / 255, 0),
    }
    for (dtype, symmetric), (scale, zero_point) in expected.items():
        model = nn.Sequential(nn.Linear(18, 1, bias=False))
        model[0].weight.data = torch.arange(1.0, 19.0).view(1, 18)
        scheme = "per_tensor_symmetric" if symmetric else "per_tensor_affine"
        entry = {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]}
        QAT_Quantizer(model, [{**entry, "quant_dtype": dtype, "quant_scheme": scheme}])
        params = model[0].weight_quantizer.affine_params()
        assert float(params.delta) == pytest.approx(scale)
        assert float(torch.as_tensor(params.zero_point)) == zero_point


def test_reference_values_of_the_average() -> None:
    """Maximum 0.2, then 0.8, and minimum 0, then 0.2, with momentum 0.99 (docs/algorithms.md D4)."""
    model = nn.Sequential(nn.ReLU())
    quantizer = QAT_Quantizer(model, [{"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]}])
    quantizer.train()
    model(torch.tensor([0.0, 0.2]))
    model(torch.tensor([0.2, 0.8]))
    low, high = model[0].acts_quantizer.observer.get_ranges()
    assert (float(low), float(high)) == (pytest.approx(0.002), pytest.approx(0.206))


def layers(config_list: Any) -> dict[str, Any]:
    quantizer = QAT_Quantizer(Mnist(), config_list)
    return {path: sorted(config.targets.items()) for path, config in quantizer.layers.items()}


def test_the_last_entry_that_matches_replaces_all_before() -> None:
    weight = {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"]}
    output = {"quant_types": ["output"], "quant_bits": 4, "op_types": ["Conv2d"], "op_names": ["conv2", "fc"]}
    found = layers([weight, output])
    assert found == {"conv1": [("weight", Target(8))], "conv2": [("output", Target(4))]}


def test_exclude_is_honoured_and_false_does_not_exclude() -> None:
    weight = {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"]}
    assert list(layers([weight, {"exclude": True, "op_names": ["fc"]}])) == ["conv1", "conv2"]
    again = {**weight, "exclude": False, "op_names": ["fc"]}
    assert list(layers([weight, {"exclude": True, "op_types": ["Linear"]}, again])) == ["conv1", "conv2", "fc"]


def test_global_settings_fill_what_an_entry_leaves_open() -> None:
    set_quant_scheme_dtype("weight", "per_channel_symmetric", "int")
    entry = {"quant_types": ["weight", "output"], "quant_bits": {"weight": 4, "output": 8}, "op_names": ["fc"]}
    found = layers([entry])
    assert found == {"fc": [("output", Target(8)), ("weight", Target(4, "int", True, "/channel"))]}
    assert layers([{**entry, "quant_dtype": {"weight": "uint"}}])["fc"][1][1] == Target(4, "uint", True, "/channel")


MODERN = {"op_names_re": ["conv.*"], "target_names": ["weight", "_output_"], "quant_dtype": "int4"}


def test_the_spelling_of_3_0() -> None:
    found = layers(
        [
            {**MODERN, "target_settings": {"weight": {"granularity": "out_channel"}}},
            {
                "op_types": ["Conv2d", "Linear"],
                "target_names": ["weight"],
                "quant_dtype": "uint8",
                "quant_scheme": "affine",
            },
            {"op_types": ["ReLU6"], "exclude_op_names": ["relu2"], "target_names": ["_output_"]},
        ]
    )
    assert found == {
        "conv1": [("output", Target(4, "int", True)), ("weight", Target(4, "int", True, "/channel"))],
        "conv2": [("output", Target(4, "int", True)), ("weight", Target(4, "int", True, "/channel"))],
        "relu1": [("output", Target(8, "int", True))],
        "fc": [("weight", Target(8, "uint", False))],
    }


def test_fuse_names_of_3_0_folds_batch_norms() -> None:
    model = Mnist()
    QAT_Quantizer(model, [{**MODERN, "fuse_names": [("conv1", "bn1")]}])
    assert model.conv1.fold_mode == "running"


BAD: dict[str, tuple[Any, str]] = {
    "no list": ({}, "config_list must be a list of dictionaries"),
    "no dictionary": (["Conv2d"], r"config_list\[0\] must be a dictionary"),
    "no selector": ([{"quant_types": ["weight"], "quant_bits": 8}], "needs op_types, op_names or both"),
    "no bits": ([{"quant_types": ["weight"], "op_types": ["Conv2d"]}], "needs quant_bits, or exclude: True"),
    "bits": (
        [{"quant_types": ["weight"], "quant_bits": 32, "op_types": ["Conv2d"]}],
        "quant_bits of weight must be a whole number from 1 to 31, got 32",
    ),
    "bits of one": (
        [{"quant_types": ["weight", "output"], "quant_bits": {"weight": 8}, "op_types": ["Conv2d"]}],
        "quant_bits must have a value for 'output'",
    ),
    "type": ([{"quant_types": ["wieght"], "quant_bits": 8, "op_types": ["Conv2d"]}], "did you mean 'weight'"),
    "key": ([{"quant_type": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"]}], "did you mean 'quant_types'"),
    "scheme": (
        [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"], "quant_scheme": "per_tensor"}],
        "Allowed: per_tensor_affine, per_tensor_symmetric, per_channel_affine, per_channel_symmetric",
    ),
    "exclude": ([{"exclude": "yes", "op_types": ["Conv2d"]}], "exclude must be True or False, got 'yes'"),
    "start": (
        [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"], "quant_start_step": -1}],
        "quant_start_step must be a whole number of at least 0, got -1",
    ),
    "no weight": (
        [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["ReLU6"]}],
        r"module 'relu1' \(ReLU6\) has no weight to quantize; it has input, output",
    ),
    "mixed": (
        [MODERN, {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"]}],
        r"mixes the spelling of NNI 2.x \(quant_types\) and of NNI 3.0 \(target_names\)",
    ),
    "dtype of 3.0": (
        [{**MODERN, "quant_dtype": "float8"}],
        "quant_dtype must be intN or uintN with N from 1 to 31, such as 'int8', got .float8.",
    ),
    "target of 3.0": ([{**MODERN, "target_names": ["output"]}], "did you mean '_output_'"),
    "granularity": ([{**MODERN, "granularity": "rows"}], r"granularity must be one of default, .*got 'rows'"),
    "blocks": (
        [{**MODERN, "target_names": ["weight"], "granularity": [1, 2, 3, 4, 5]}],
        r"'weight' of 'conv1': granularity \[1, 2, 3, 4, 5\] has more axes than its shape \(4, 1, 5, 5\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_config_lists_are_refused_in_words(case: str) -> None:
    config_list, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        QAT_Quantizer(Mnist(), config_list)


def test_unknown_names_and_types_warn() -> None:
    with pytest.warns(UserWarning, match="op_names 'conv3' is not in the model; did you mean 'conv2'?"):
        QAT_Quantizer(Mnist(), [{"quant_types": ["weight"], "quant_bits": 8, "op_names": ["conv3"]}])
    with pytest.warns(UserWarning, match="op_types 'Conv2D' is not in the model"):
        QAT_Quantizer(Mnist(), [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2D"]}])


def test_quantization_starts_at_its_step_and_steps_are_the_optimizer_s() -> None:
    model = Mnist()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    entry = {"quant_types": ["weight"], "quant_bits": 2, "op_names": ["fc"], "quant_start_step": 2}
    quantizer = QAT_Quantizer(model, [entry], optimizer)
    states = []
    for _ in range(2):
        for _ in range(2):  # gradients are accumulated over two forwards
            model(digits()).sum().backward()
            states.append(model.fc.state.name)
        optimizer.step()
    assert states == ["CALIBRATION", "CALIBRATION", "QUANT_AWARE_TRAIN", "QUANT_AWARE_TRAIN"]
    other = QAT_Quantizer(Mnist(), [entry])
    other.load_state_dict(quantizer.state_dict())
    assert int(other.steps) == 3


QAT_CONFIG = [
    {"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]},
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU6"]},
]


def test_qat_exports_float_weights_and_the_folded_batch_norm_restored(tmp_path: Path) -> None:
    model = Mnist()
    quantizer = QAT_Quantizer(model, QAT_CONFIG, dummy_input=digits(1))
    model(digits()).sum().backward()
    before = model.conv1.layer.weight.detach().clone()
    config = quantizer.export_model(tmp_path / "model.pth", tmp_path / "calibration.pth")
    plain = Mnist()
    plain.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    assert torch.equal(plain.conv1.weight, before)
    assert set(config) == {"conv1", "relu1", "conv2", "relu2", "fc"}
    assert set(config["conv1"]) == {
        *("weight_bits", "weight_scale", "weight_zero_point", "input_bits", "tracked_min_input", "tracked_max_input")
    }
    assert set(config["relu1"]) == {"output_bits", "tracked_min_output", "tracked_max_output"}
    assert torch.load(tmp_path / "calibration.pth", weights_only=True) == config
    expected = model.eval()(digits(2).fill_(0.3))
    restored = QAT_Quantizer(plain, QAT_CONFIG, dummy_input=digits(1))
    restored.load_calibration_config(config)
    assert torch.equal(plain.eval()(digits(2).fill_(0.3)), expected)


def test_observer_exports_quantized_weights(tmp_path: Path) -> None:
    model = Mnist().eval()
    names = {"op_names": ["conv1", "fc"]}
    quantizer = ObserverQuantizer(model, [{"quant_types": ["weight", "input"], "quant_bits": 8, **names}])
    with pytest.raises(ConfigError, match="conv1, fc saw no data; run some batches through the model before compress"):
        quantizer.compress()
    model(digits())
    quantizer.compress()
    quantizer.export_model(tmp_path / "model.pth")
    exported = torch.load(tmp_path / "model.pth", weights_only=True)
    assert len(exported["conv1.weight"].unique()) <= 255
    assert torch.equal(exported["conv1.weight"], model.conv1.weight_quantizer(model.conv1.layer.weight))
    plain = Mnist().eval()
    plain.load_state_dict(exported, strict=True)
    x = digits()
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), atol=0.2, rtol=0.0)


def test_onnx_comes_out_and_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from torchquant.deploy import run_onnx

    model = Mnist()
    config = [{"quant_types": ["weight", "output"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]}]
    quantizer = QAT_Quantizer(model, config)
    for _ in range(3):
        model(digits())
    model.eval()
    with pytest.raises(ConfigError, match="onnx_path needs input_shape"):
        quantizer.export_model(tmp_path / "m.pth", onnx_path=tmp_path / "m.onnx")
    quantizer.export_model(tmp_path / "m.pth", onnx_path=tmp_path / "m.onnx", input_shape=(1, 1, 28, 28))
    x = digits(1)
    delta = float(model.fc.acts_quantizer.affine_params().delta)
    found = torch.as_tensor(run_onnx(tmp_path / "m.onnx", x))
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), atol=1.01 * delta, rtol=0.0)


def test_naive_rounds_to_nearest_and_takes_8_bits_only() -> None:
    model = Mnist()
    weight = model.fc.weight.detach().clone()
    NaiveQuantizer(model).compress()
    step = float(weight.abs().max()) / 127
    assert float((model.fc.weight_quantizer(weight) - weight).abs().max()) <= 0.501 * step
    with pytest.raises(ConfigError, match="quant_bits of NaiveQuantizer must be 8, got 4"):
        NaiveQuantizer(Mnist(), [{"quant_types": ["weight"], "quant_bits": 4, "op_types": ["default"]}])


@pytest.mark.parametrize("kind", [LsqQuantizer, LsqPlusQuantizer, DoReFaQuantizer, PtqQuantizer])
def test_the_quantizers_of_3_0_train_through_an_evaluator(kind: Any) -> None:
    torch.manual_seed(0)
    model = Mnist()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    seen: list[Any] = []

    def train(net: nn.Module, optimizers: Any, step: Any, schedulers: Any, max_steps: Any, max_epochs: Any) -> None:
        seen.append((max_steps, max_epochs))
        for _ in range(max_steps):
            optimizers.zero_grad()
            step(net(digits())).backward()
            optimizers.step()

    evaluator = TorchEvaluator(train, optimizer, lambda y: y.square().mean(), evaluating_func=lambda m: m(digits()))
    targets = ["weight"] if kind is DoReFaQuantizer else ["_input_", "weight", "_output_"]
    quantizer = kind(model, [{"op_types": ["Conv2d"], "target_names": targets, "quant_dtype": "int4"}], evaluator)
    found, config = quantizer.compress(2, None)
    assert found is model
    assert set(config) == {"conv1", "conv2"}
    assert {"quant_bits", "quant_dtype"} <= set(config["conv1"]["weight"])
    if kind is not PtqQuantizer:
        assert seen == [(2, None)]
    if kind in (LsqQuantizer, PtqQuantizer):
        assert {"scale", "zero_point", "tracked_min", "tracked_max"} <= set(config["conv1"]["_input_0"])


def test_lsq_calibration_comes_back(tmp_path: Path) -> None:
    only_outputs = [{"quant_types": ["output"], "quant_bits": 4, "op_types": ["Conv2d", "ReLU6"]}]
    model = Mnist()
    quantizer = LsqQuantizer(model, only_outputs)
    model(digits())
    found = quantizer.export_model(tmp_path / "lsq.pth")
    other = LsqQuantizer(Mnist(), only_outputs)
    other.load_calibration_config(found)
    ours, theirs = (m.relu1.acts_quantizer.affine_params() for m in (model, other.bound_model))
    assert torch.allclose(ours.delta, theirs.delta)
    assert (ours.qmin, ours.qmax) == (theirs.qmin, theirs.qmax) == (0, 15)
    with pytest.raises(ConfigError, match="has 'nowhere', which is not quantized here; it belongs to another model"):
        other.load_calibration_config({"nowhere": {}})
    with pytest.raises(ConfigError, match="has 8 bits for the output of 'relu1', but the model has 4"):
        other.load_calibration_config(
            {"relu1": {"output_bits": 8, "tracked_min_output": 0.0, "tracked_max_output": 1.0}}
        )
    with pytest.raises(ConfigError, match="a range for the input of 'relu1', which is not quantized here"):
        other.load_calibration_config({"relu1": {"tracked_min_input": 0.0, "tracked_max_input": 1.0}})


def test_names_are_at_nni_s_addresses() -> None:
    assert nni.algorithms.compression.pytorch.quantization.QAT_Quantizer is QAT_Quantizer
    assert nni.compression.quantization.PtqQuantizer is PtqQuantizer


def test_bnn_wants_one_bit_and_folds_nothing() -> None:
    with pytest.raises(ConfigError, match="quant_bits of BNNQuantizer must be 1, got 8"):
        BNNQuantizer(Mnist(), [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"]}])
    with pytest.raises(ConfigError, match="BNNQuantizer cannot fold batch norms; leave dummy_input out"):
        BNNQuantizer(Mnist(), [], dummy_input=digits())
