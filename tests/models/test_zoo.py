"""Models of other people: torchvision, timm, transformers. Random weights, nothing is downloaded.

Each, quantized by one call: BYPASSED is the float model bit for bit, calibration reaches every quantizer of what
runs in evaluation, a QAT step has finite gradients, the state reloads strictly, `revert` gives the float model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchquant import QModuleState, QuantPlan, QuantSpec, qmodule_state, quantize, set_qmodule_state
from torchquant.graph.called import tensors_in
from torchquant.graph.recording import call_with
from torchquant.utils import state_report

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TORCHVISION_FAST = ["mobilenet_v3_small"]
TORCHVISION_SLOW = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "resnet18", "resnext50_32x4d", "swin_t", "swin_v2_t", "vgg11_bn"),
    *("squeezenet1_1", "vit_b_16", "wide_resnet50_2", "shufflenet_v2_x0_5", "regnet_y_400mf"),
]
TIMM_FAST = ["test_vit", "test_convnext"]
TIMM_SLOW = [
    *(
        "mobilenetv3_small_100",
        "resnet18",
        "efficientnet_lite0",
        "tf_efficientnet_b0",
        "convnext_atto",
        "vit_tiny_patch16_224",
    ),
    *("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "regnetx_002", "ghostnet_100", "repvgg_a0"),
    *("mixer_s32_224", "edgenext_xx_small", "levit_128s", "poolformer_s12", "densenet121"),
]
SIDES = {"vit_b_16": 224, "maxvit_t": 224, "inception_v3": 299, "test_vit": 160}
WITH_AUXILIARY = ("googlenet", "inception_v3")


def side(name: str) -> int:
    transformer = any(part in name for part in ("patch", "mixer", "levit"))
    return SIDES.get(name, 224 if transformer else 112)


def compared(model: nn.Module, inputs: Any) -> list[Tensor]:
    return [t for t in tensors_in(call_with(model, inputs)) if t.is_floating_point()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(net: nn.Module, inputs: Any, uncalibrated: tuple[str, ...] = ()) -> nn.Module:
    """All that is promised of any model; the calibrated model."""
    # Heads that begin at zero would hide what is before them.
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    net.eval()
    plan = QuantPlan.from_rules("w8a8", net, inputs)
    model = plan.apply(net)
    with torch.no_grad():
        expected = compared(net, inputs)
        assert equal(compared(model, inputs), expected)
        with qmodule_state(model, QModuleState.CALIBRATION):
            call_with(model, inputs)
        set_qmodule_state(model, QModuleState.QUANT_EVAL)
        open_sites = [row.path for row in state_report(model) if not row.calibrated]
        assert [path for path in open_sites if not any(path.startswith(part) for part in uncalibrated)] == []
        quantized = compared(model, inputs)
        assert float((quantized[0] - expected[0]).norm() / expected[0].norm()) < 0.5
        fresh = plan.apply(net)
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert equal(compared(fresh.eval(), inputs), quantized)
        reverted = plan.revert(model)
        assert type(reverted) is type(net)
        assert list(reverted.state_dict()) == list(net.state_dict())
        assert equal(compared(reverted, inputs), expected)
    set_qmodule_state(fresh.train(), QModuleState.QUANT_AWARE_TRAIN)
    sum(t.square().mean() for t in compared(fresh, inputs)).backward()
    assert [name for name, p in fresh.named_parameters() if p.grad is not None and not p.grad.isfinite().all()] == []
    assert any(p.grad is not None and bool(p.grad.any()) for p in fresh.parameters())
    return model


def learned_step(net: nn.Module, inputs: Any) -> None:
    """A step that trains quantizers reaches the parameters of each one that quantizes."""
    model = quantize(net, "w4a4-lsq", inputs)
    set_qmodule_state(model.train(), QModuleState.QUANT_AWARE_TRAIN)
    call_with(model, inputs)
    sum(t.square().mean() for t in compared(model, inputs)).backward()
    learned = {n: p.grad for n, p in model.named_parameters() if "quantizer" in n}
    missing = [n for n, grad in learned.items() if grad is None or not bool(grad.isfinite().all())]
    assert missing == []


def torchvision_model(name: str) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return getattr(torchvision.models, name)(**({"init_weights": False} if name in WITH_AUXILIARY else {}))


def image(name: str) -> Tensor:
    return torch.randn(2, 3, side(name), side(name))


def _torchvision(name: str) -> None:
    check(torchvision_model(name), image(name), ("aux", "AuxLogits"))


@pytest.mark.parametrize("name", TORCHVISION_FAST)
def test_torchvision(name: str) -> None:
    _torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION_SLOW)
def test_torchvision_families(name: str) -> None:
    _torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TORCHVISION_FAST, *TORCHVISION_SLOW])
def test_torchvision_compiles(name: str) -> None:
    model = quantize(torchvision_model(name).eval(), "w8a8", image(name))
    x = image(name)
    with torch.no_grad(), qmodule_state(model, QModuleState.CALIBRATION):
        model(x)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


def _timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    check(timm.create_model(name, pretrained=False), image(name))


@pytest.mark.parametrize("name", TIMM_FAST)
def test_timm(name: str) -> None:
    _timm(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_SLOW)
def test_timm_families(name: str) -> None:
    _timm(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TIMM_FAST, *TIMM_SLOW])
def test_timm_learns_and_compiles(name: str) -> None:
    timm = pytest.importorskip("timm")
    net, x = timm.create_model(name, pretrained=False), image(name)
    learned_step(net, x)
    model = quantize(net.eval(), "w8a8", x)
    with torch.no_grad(), qmodule_state(model, QModuleState.CALIBRATION):
        model(x)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TORCHVISION_FAST, *TORCHVISION_SLOW])
def test_torchvision_learns(name: str) -> None:
    learned_step(torchvision_model(name), image(name))


def test_batch_norm_with_activation_in_one_module_is_split() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("mobilenetv3_small_100", pretrained=False).eval()
    model = quantize(net, "w8a8", image("mobilenetv3_small_100"))
    assert model.plan.floats == ()
    stem = model.conv_stem
    assert (type(stem.bn), type(stem.activation)) == (nn.BatchNorm2d, nn.Hardswish)
    assert stem.fold_mode == "corrected"
    model.load_state_dict(net.state_dict())


def _small(config: Any, **more: Any) -> Any:
    return config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **more)


def bert(hf: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return hf.BertForSequenceClassification(_small(hf.BertConfig, vocab_size=99)), inputs


def gpt2(hf: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    config = hf.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config), {"input_ids": ids, "use_cache": False}


def vit(hf: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    pixels = torch.randn(2, 3, 32, 32)
    return hf.ViTForImageClassification(_small(hf.ViTConfig, image_size=32, patch_size=8)), {"pixel_values": pixels}


def llama(hf: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    config = _small(hf.LlamaConfig, vocab_size=99, num_key_value_heads=2)
    return hf.LlamaForCausalLM(config), {"input_ids": ids, "use_cache": False}


@pytest.mark.parametrize(
    "build", [bert, llama, *(pytest.param(f, marks=pytest.mark.slow) for f in (gpt2, vit))], ids=lambda f: f.__name__
)
def test_transformers(build: Callable[[Any, Tensor], tuple[nn.Module, Any]]) -> None:
    hf = pytest.importorskip("transformers")
    net, inputs = build(hf, torch.randint(0, 99, (2, 12)))
    model = check(net, inputs)
    left = QuantPlan.from_rules("w8a8", net).floats
    assert any(f.path == "" and f.why.startswith("operators between its layers: ") for f in left)
    learned_step(copy.deepcopy(net), inputs)
    n_linear = sum(isinstance(m, nn.Linear | nn.Conv2d) or type(m).__name__ == "Conv1D" for m in net.modules())
    widths = {row.path: row.n_bits for row in state_report(model) if row.site == "weight"}
    n_tables = sum(isinstance(m, nn.Embedding) for m in net.modules())
    assert len(widths) == n_linear + n_tables


@pytest.mark.slow
@pytest.mark.parametrize("build", [bert, gpt2, vit, llama], ids=lambda f: f.__name__)
def test_transformers_compile(build: Callable[[Any, Tensor], tuple[nn.Module, Any]]) -> None:
    hf = pytest.importorskip("transformers")
    net, inputs = build(hf, torch.randint(0, 99, (2, 12)))
    model = check(net, inputs)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(compared(torch.compile(model, backend="eager"), inputs), compared(model, inputs))


def test_specs_of_the_ready_sets_print_back() -> None:
    from torchquant.plan import RULE_SETS

    fields = [item for rules in RULE_SETS.values() for rule in rules for item in rule.items()]
    specs = {spec for field, spec in fields if field in ("weight", "input") and spec is not None}
    assert {str(QuantSpec.parse(spec)) for spec in specs} == specs
