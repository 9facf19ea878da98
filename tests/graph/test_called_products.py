"""Products in forwards that are not traced, such as those of attention in models of transformers."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.graph.called import CalledProduct
from torchquant.graph.watched import WatchedModule
from torchquant.plan import QuantPlan
from torchquant.qmodule.attention import QAttention, attention


class Attention(nn.Module):
    """Two heads of attention; torch.fx does not trace the forward, which unpacks a size."""

    def __init__(self, kind: str = "sdpa", causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.kind, self.causal, self.drop = kind, causal, 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shape = (*x.shape[:-1], 2, 4)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-2, -1) / 2
            if self.causal:
                n = x.shape[1]
                scores = scores + torch.full((n, n), -math.inf).triu(1)
            y = F.dropout(torch.softmax(scores, -1), self.drop, self.training).matmul(v)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


def rules(bits: int, **more: str) -> list[dict[str, Any]]:
    return [{"types": ["matmul", "attention"], "input": f"affine:{bits}", "probabilities": f"affine:{bits}", **more}]


def made(net: nn.Module, x: Any, bits: int = 8) -> Any:
    """The net with quantized products, calibrated on x."""
    model = tq.quantize(net, rules(bits), x)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    return model


def fixture(kind: str = "sdpa", causal: bool = False) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention(kind, causal).eval(), torch.randn(3, 5, 8)


def on_grid(x: Tensor, bits: int) -> Tensor:
    """x on an affine grid from its smallest to its largest value, with a level at 0, in float64."""
    low, high = x.min().clamp(max=0).double(), x.max().clamp(min=0).double()
    step = (high - low) / (2**bits - 1)
    zero = torch.round(-low / step)
    return (torch.clamp(torch.round(x.double() / step) + zero, 0, 2**bits - 1) - zero) * step


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
def test_operands_and_probabilities_are_on_their_grids(kind: str, causal: bool, bits: int) -> None:
    net, x = fixture(kind, causal)
    model = made(net, x, bits)
    with torch.no_grad():
        heads = [layer(x).view(3, 5, 2, 4).transpose(1, 2) for layer in (net.q, net.k, net.v)]
        q, k, v = (on_grid(t, bits) for t in heads)
        scores = q @ k.mT / 2
        if causal:
            scores = scores + torch.full((5, 5), -math.inf).triu(1)
        levels = 2**bits - 1
        y = torch.round(scores.softmax(-1) * levels) / levels @ v
        expected = net.double().o(y.transpose(1, 2).reshape(3, 5, 8))
        torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_states_files_and_gradients(kind: str, tmp_path: Path) -> None:
    net, x = fixture(kind)
    model, expected = made(net, x), net(x)
    y = model(x)
    assert not torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=0, atol=0.02)
    for state in (tq.QModuleState.BYPASSED, tq.QModuleState.CALIBRATION, tq.QModuleState.QUANT_EVAL_WEIGHT_ONLY):
        with tq.qmodule_state(model, state):
            assert torch.equal(model(x), expected), state
    path = model.plan.save(tmp_path / "plan.yaml")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = QuantPlan.load(path).apply(net)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (loaded, copy.deepcopy(model), torch.load(whole, weights_only=False)):
        assert torch.equal(other(x), y)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), y)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    model(x).square().sum().backward()
    twin = copy.deepcopy(net)
    twin(x).square().sum().backward()
    for name in ("q", "k", "v"):
        ours, theirs = model.get_submodule(name).weight.grad, twin.get_submodule(name).weight.grad
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.95
    back = model.plan.revert(model)
    assert type(back) is Attention
    assert back.state_dict().keys() == net.state_dict().keys()


def test_probabilities_keep_their_range_and_need_no_data() -> None:
    net, x = fixture("eager")
    model = tq.quantize(net, [{"types": ["matmul"], "probabilities": "affine:4"}], x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    before = model(x)
    with tq.qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN):
        model(0.01 * x)
    assert torch.equal(model(x), before)
    torch.testing.assert_close(model.quantize_softmax.acts_quantizer.levels(), torch.arange(16) / 15)
    with pytest.raises(ConfigError, match="probabilities have one range, from 0 to 1; leave the granularity out"):
        tq.quantize(net, [{"types": ["matmul"], "probabilities": "affine:4/channel"}], x)
    for fixed in ("dorefa:4", "pot:4"):  # schemes with numbers of their own
        other = tq.quantize(net, [{"types": ["matmul"], "probabilities": fixed}], x)
        with tq.qmodule_state(other, tq.QModuleState.QUANT_AWARE_TRAIN):
            other(x)


def test_sites_are_named_and_counted() -> None:
    net, x = fixture("sdpa")
    plan = QuantPlan.from_rules(rules(8), net, x)
    assert [(site.path, site.input, site.probabilities) for site in plan.sites] == [
        ("attention", "affine:8", "affine:8")
    ]
    assert plan.products == {"": (CalledProduct("attention", "scaled_dot_product_attention", (-1, -1, -1)),)}
    assert "probabilities" in str(plan)
    cost = {site.path: site for site in plan.cost(net, x)}
    assert (cost["attention"].macs, cost["attention"].input_bits) == (2 * 5 * 5 * 8, 8)
    every = QuantPlan.from_rules("w8a8-transformer", net, x)
    assert every.coverage is not None
    assert every.coverage.mac_share == 1.0
    net, x = fixture("eager")
    assert [call.operands for call in QuantPlan.from_rules(rules(8), net, x).products[""]] == [(-1, -1), (), (1, -1)]


class Outer(nn.Module):
    """A product of its own around attention, weights that no layer owns, and a loop over parts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight, self.n_parts = Attention("eager"), nn.Parameter(torch.eye(8)), 2

    def forward(self, x: Tensor) -> Tensor:
        n, *_ = x.shape
        y = self.inner(x)
        parts = [part @ part.mT for part in y.split(-(-n // self.n_parts))]
        return torch.cat(parts) @ x @ self.weight


def test_products_inside_of_others_in_rounds_and_with_weights() -> None:
    torch.manual_seed(0)
    net, x = Outer().eval(), torch.randn(4, 5, 8)
    model = made(net, x)
    assert {site.path for site in model.plan.sites} == {
        "inner.matmul",
        "inner.matmul_1",
        "matmul",
        "matmul_1",
        "matmul_2",
    }
    products = model.plan.products
    assert [(call.operator, bool(call.operands)) for call in products[""]] == [("matmul", True)] * 3 + [
        ("matmul", False)
    ]
    torch.testing.assert_close(model(x), net(x), rtol=0, atol=0.3)
    for model.n_parts, n in ((1, 3), (4, 6)):
        with pytest.raises(ConfigError, match=f"matmul, matmul, matmul, matmul; now it stopped after {n}, so that"):
            model(x)


class Rounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([y @ y.mT for y in self.layer(x) * 1.0])


def test_a_loop_counts_as_one_round() -> None:
    torch.manual_seed(0)
    net, x = Rounds().eval(), torch.randn(3, 4, 4)
    model = made(net, x)
    assert model.plan.products == {"": (CalledProduct("matmul", "matmul", (-1, -1), loops=True),)}
    assert model.quantize_matmul_0.acts_quantizer.observer.n_calls == 3
    assert model(torch.randn(5, 4, 4)).shape == (5, 4, 4)


def test_products_of_quantizers_and_transforms_are_not_those_of_the_forward() -> None:
    from torchquant.qmodule import Rotation

    net, x = fixture("eager")
    model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:8/channel"}, *rules(8)], x)
    model.q.transform_input(Rotation(torch.ones(8), [math.sqrt(8) * torch.eye(8)]))
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    torch.testing.assert_close(model(x), net(x), rtol=0, atol=0.02)


def test_another_kind_of_attention_is_refused() -> None:
    net, x = fixture("sdpa")
    model = made(net, x)
    model.kind = "eager"
    with pytest.raises(ConfigError, match=r"quantized: attention; now it calls matmul after 0, .*skip"):
        model(x)
    tq.set_qmodule_state(model, tq.QModuleState.BYPASSED)
    model(x)


def test_a_traced_attention_has_probabilities_too() -> None:
    class Traced(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.q, self.k, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), kind

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x), self.k(x)
            if self.kind == "sdpa":
                return F.scaled_dot_product_attention(q, k, k)
            return F.dropout(torch.softmax(q @ k.mT / 2, -1), 0.1, self.training) @ k

    torch.manual_seed(0)
    x, found = torch.randn(3, 5, 4), {}
    for kind in ("sdpa", "eager"):
        torch.manual_seed(1)
        net = Traced(kind).eval()
        model = made(net, x, 3)
        assert not any(isinstance(module, WatchedModule) for module in model.modules())
        found[kind] = model(x)
        loaded = tq.quantize(net, rules(3), x)
        loaded.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(loaded(x), found[kind])
        q, k = (on_grid(layer(x), 3) for layer in (net.q, net.k))
        expected = torch.round((q @ k.mT / 2).softmax(-1) * 7) / 7 @ k
        torch.testing.assert_close(found[kind].double(), expected, rtol=0, atol=1e-5)
    assert isinstance(tq.quantize(Traced("sdpa"), rules(3), x).attention, QAttention)


@pytest.mark.parametrize(
    "more", [{}, {"is_causal": True}, {"enable_gqa": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "float"}]
)
def test_attention_product_by_product(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    n_heads = 2 if "enable_gqa" in more else 4
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, n_heads, 6, 8), torch.randn(2, n_heads, 6, 3)
    kind = more.pop("mask", None)
    mask = torch.rand(6, 6) > 0.5
    mask[2] = False
    if kind is not None:
        more = {"attn_mask": mask if kind == "bool" else torch.where(mask, 0.0, -math.inf)}
    y = attention(q, k, v, probabilities=lambda p: p, **more)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, **more))


@pytest.mark.parametrize("kind", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_integers(kind: str) -> None:
    from torchquant.deploy import to_integer

    net, x = fixture(kind)
    model = made(net, x)
    with torch.no_grad():
        torch.testing.assert_close(to_integer(model, x)(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_files(kind: str, tmp_path: Path) -> None:
    from torchquant.deploy import certify, export_onnx

    net, x = fixture(kind)
    model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:8/channel", "input": "affine:8"}, *rules(8)], x)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    path = export_onnx(model, tmp_path / "model.onnx", x, verify=False)
    assert not certify(model, path, [x]).failures


def _tensors(value: Any) -> list[Tensor]:
    from torchquant.graph.called import tensors_in

    return [x for x in tensors_in(value) if x.is_floating_point()]


def _bert(hf: Any, **more: Any) -> Any:
    config = hf.BertConfig(vocab_size=40, num_hidden_layers=1, **more)
    return hf.BertModel(config), {"attention_mask": torch.arange(6).lt(torch.tensor([6, 4])[:, None]).long()}


def _llama(hf: Any, **more: Any) -> Any:
    config = hf.LlamaConfig(vocab_size=40, num_hidden_layers=1, num_key_value_heads=2, **more)
    return hf.LlamaForCausalLM(config), {"use_cache": False}


def _t5(hf: Any, **more: Any) -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    config = hf.T5Config(vocab_size=40, attn_implementation=more["attn_implementation"], **sizes)
    return hf.T5Model(config), {"decoder_input_ids": torch.arange(8).view(2, 4), "use_cache": False}


def _vit(hf: Any, **more: Any) -> Any:
    config = hf.ViTConfig(num_hidden_layers=1, image_size=8, patch_size=4, **more)
    return hf.ViTModel(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


MODELS: dict[str, Callable[..., Any]] = {"llama": _llama, "bert": _bert, "t5": _t5, "vit": _vit}
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) == ("llama", "sdpa") else pytest.mark.slow)
    for name in MODELS
    for kind in ("sdpa", "eager")
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_models_of_transformers(name: str, kind: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    net, inputs = MODELS[name](hf, attn_implementation=kind, **sizes)
    net.eval()
    ids = {} if name == "vit" else {"input_ids": torch.arange(12).view(2, 6)}
    inputs = {**ids, **inputs}
    errors = {}
    with torch.no_grad():
        expected = _tensors(net(**inputs))
        for bits in (8, 2):
            model = tq.quantize(net, rules(bits), inputs)
            assert all(map(torch.equal, _tensors(model(**inputs)), expected))
            with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
                model(**inputs)
            tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
            found = _tensors(model(**inputs))
            errors[bits] = max(
                float((a - b).square().mean() / b.square().mean()) for a, b in zip(found, expected, strict=True)
            )
        fresh = tq.quantize(net, rules(2), inputs)
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert all(map(torch.equal, _tensors(fresh(**inputs)), found))
    assert errors[8] < 1e-3
    assert errors[2] > 100 * errors[8]
    per_layer = {"sdpa": 1, "eager": 2}[kind] * (3 if name == "t5" else 1)
    assert len(model.plan.sites) == per_layer
