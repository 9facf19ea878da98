"""A wrapper is its layer: for reads, writes, hooks, names, keys and copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torchquant as tq
from torchquant import QModuleState as S
from torchquant.errors import ConfigError
from torchquant.qmodule import QOp, QWeights, QWrapper, float_state_dict
from torchquant.qmodule.fused_part import current_keys
from torchquant.quantizers import LSQQuantizer


def weight_norm(layer: nn.Module, name: str = "weight") -> Any:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer, name)


def calibrated(net: nn.Module, x: Tensor, scheme: Any = "w8a8") -> Any:
    model = tq.quantize(net, scheme, x)
    with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
        model(x)
    return model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.attention(x, x, x)[0])
        return self.head(self.recurrent(y)[0])


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 2))


NETS: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (convolutional, torch.randn(2, 3, 8, 8)),
    (Attention, torch.randn(2, 5, 8)),
    (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 4)), nn.GELU()), torch.randn(2, 8)),
]


@pytest.mark.parametrize(("make", "x"), NETS)
def test_names_and_keys_are_those_of_the_float_model(make: Callable[[], nn.Module], x: Tensor) -> None:
    net = make().eval()
    model = calibrated(net, x, "w4a4-lsq")
    kept = [key for key in model.state_dict() if "quantizer" not in key and not key.endswith("_extra_state")]
    assert sorted(kept) == sorted(net.state_dict())
    named = {name: parameter for name, parameter in model.named_parameters() if "quantizer" not in name}
    assert [(n, p.shape) for n, p in named.items()] == [(n, p.shape) for n, p in net.named_parameters()]
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(every) == len(set(every)) == len(list(model.parameters()))
    assert {type(m) for m in net.modules()} - {type(net)} <= {type(m) for m in model.modules()}
    for key, value in float_state_dict(model).items():
        assert torch.equal(value, net.state_dict()[key])
    model.load_state_dict(net.state_dict())
    assert torch.equal(model(x), net(x))


@pytest.mark.parametrize(("make", "x"), NETS)
def test_checkpoints_with_the_keys_of_0_1_load(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = calibrated(make().eval(), x, "w4a4-lsq")
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    holders = {path: m for path, m in model.named_modules() if isinstance(m, QWrapper | QWeights | QOp) and m.held}
    old: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        path = max((p for p in holders if key.startswith(f"{p}.")), key=len, default=None)
        rest = key.removeprefix(f"{path}.")
        is_held = path is not None and rest.partition(".")[0] in {
            *holders[path].held._parameters,
            *holders[path].held._modules,
        }
        of_parameter = rest.rpartition(".")[2] in ("step", "offset")
        value = value.squeeze() if of_parameter and value.numel() == 1 else value
        old[f"{path}.{holders[path].held_as}.{rest}" if is_held else key] = value
    assert old.keys() != model.state_dict().keys()
    assert any(value.ndim == 0 and "step" in key for key, value in old.items())
    fresh = tq.quantize(make().eval(), "w4a4-lsq", x)
    fresh.load_state_dict(old)
    assert torch.equal(fresh(x), model(x))
    assert set(current_keys(model, old).values()) == set(model.state_dict())


def test_a_pickle_of_0_1_loads() -> None:
    """There the layer was a child, and the wrapper had dictionaries of its own."""
    wrapper = QWrapper(nn.Linear(3, 2), tq.make_quantizer("affine:8"), None)
    state = dict(wrapper.__dict__)
    del state["_listed"]
    plain = nn.Module().__dict__
    state |= {name: plain[name] for name in plain if isinstance(plain[name], dict | set)}
    state["_modules"] = {"layer": state.pop("layer"), "weight_quantizer": wrapper.weight_quantizer}
    old = QWrapper.__new__(QWrapper)
    old.__setstate__(state)
    assert list(old.state_dict()) == list(wrapper.state_dict())
    x = torch.randn(1, 3)
    assert torch.equal(old(x), wrapper(x))
    assert list(pickle.loads(pickle.dumps(old)).state_dict()) == list(wrapper.state_dict())


def test_a_parameter_that_is_set_is_used() -> None:
    net = Language().eval()
    tokens = torch.randint(20, (4, 7))
    model = calibrated(net, tokens)
    model.head.weight = model.table.weight
    assert sum(p.numel() for p in model.parameters()) == 160
    table = model.table.weight
    assert torch.equal(model(tokens), F.linear(torch.tanh(F.embedding(tokens, table)), table))
    larger = nn.Parameter(torch.randn(30, 8))
    model.table.weight = larger
    model.table.num_embeddings = 30
    assert model.table.layer.num_embeddings == 30
    assert model.get_parameter("table.weight") is larger
    with tq.qmodule_state(model, S.QUANT_EVAL):
        assert model(torch.tensor([29])).isfinite().all()
    model.head.weight.data += 1.0
    assert torch.equal(model.head.layer.weight, table)


def test_a_bias_is_taken_away_and_given_back() -> None:
    x = torch.randn(2, 3)
    model = calibrated(nn.Sequential(nn.Linear(3, 2)), x)
    model[0].bias = None
    assert "0.bias" not in model.state_dict()
    for state in (S.BYPASSED, S.QUANT_AWARE_TRAIN):
        tq.set_qmodule_state(model, state)
        assert torch.equal(model(torch.zeros(1, 3)), torch.zeros(1, 2))
    model[0].register_parameter("bias", nn.Parameter(torch.ones(2)))
    tq.set_qmodule_state(model, S.BYPASSED)
    assert torch.equal(model(torch.zeros(1, 3)), torch.ones(1, 2))
    del model[0].bias
    model[0].bias = nn.Parameter(torch.full((2,), 3.0))
    assert torch.equal(model(torch.zeros(1, 3)), torch.full((1, 2), 3.0))


def test_a_recurrent_weight_that_is_set_is_used() -> None:
    x = torch.randn(2, 4, 3)
    model = calibrated(nn.LSTM(3, 5, batch_first=True), x)
    with torch.no_grad():
        expected = copy.deepcopy(model.layer)
        expected.weight_hh_l0 = nn.Parameter(torch.zeros(20, 5))
        model.weight_hh_l0 = nn.Parameter(torch.zeros(20, 5))
        assert torch.equal(model(x)[0], expected(x)[0])
        model.double()
        assert model(x.double())[0].dtype == torch.float64


def test_low_rank_adapters_read_wrap_and_merge() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Parameter(torch.randn(2, base.in_features))
            self.up = nn.Parameter(torch.randn(base.out_features, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.down.t() @ self.up.t()

        def merge(self) -> None:
            self.base.weight.data = self.base.weight.data + self.up @ self.down

    x = torch.randn(4, 6)
    model = calibrated(nn.Sequential(nn.Linear(6, 5)), x)
    model[0] = Adapter(model[0])
    expected = model[0](x)
    with torch.no_grad():
        model[0].merge()
    assert torch.allclose(model[0].base(x), expected, atol=1e-5)


def test_weight_norm_trains_its_parameters_and_is_removed() -> None:
    x = torch.randn(4, 3, 12)
    for net in (nn.Sequential(weight_norm(nn.Conv1d(3, 4, 3)), nn.ReLU()),):
        model = calibrated(net, x)
        tq.set_qmodule_state(model.train(), S.QUANT_AWARE_TRAIN)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            assert model[0].weight_g.grad.any()
            assert model[0].weight_v.grad.any()
            optimizer.step()
        g, v = (p.detach().clone() for p in (model[0].weight_g, model[0].weight_v))
        weight = g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1)
        tq.observe_weights(model)  # of the weight as it is after the last step
        assert torch.allclose(model[0].weight_quantizer.observer.range_max, weight.flatten(1).amax(1))
        tq.set_qmodule_state(model, S.QUANT_EVAL)
        quantized = model[0].weight_quantizer(weight)
        before = model(x)
        remove_weight_norm(model[0])
        assert "0.weight" in model.state_dict()
        assert isinstance(model[0].layer.weight, nn.Parameter)
        assert torch.allclose(model[0].weight_quantizer(model[0].weight), quantized, atol=1e-6)
        assert torch.allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Embedding(9, 4)])
def test_pruned_weights_stay_zero_when_quantized(make: Callable[[], nn.Module], late: bool) -> None:
    layer = make()
    x = torch.randn(3, 6) if isinstance(layer, nn.Linear) else torch.randint(9, (3,))
    if not late:
        prune.random_unstructured(layer, "weight", amount=0.5)
    model = calibrated(nn.Sequential(layer), x, [{"weight": "affine:8/channel"}])
    assert sorted(model[0].quantizers()) == ["weight"]
    if late:
        prune.random_unstructured(model[0], "weight", amount=0.5)
    mask = model[0].weight_mask
    tq.set_qmodule_state(model.train(), S.QUANT_AWARE_TRAIN)
    model(x).square().sum().backward()
    gradient = model[0].weight_orig.grad
    assert gradient.any()
    assert not gradient[mask == 0].any()
    tq.set_qmodule_state(model, S.BYPASSED)
    expected = mask * model[0].weight_orig
    assert torch.equal(model[0].weight, expected)
    prune.remove(model[0], "weight")
    assert torch.equal(model[0].weight, expected)
    assert [name for name, _ in model.named_parameters()][-1] == "0.weight"


def test_spectral_norm_iterates_once_a_call() -> None:
    x = torch.randn(3, 6)
    net = nn.Sequential(spectral_norm(nn.Linear(6, 4)), nn.ReLU())
    with torch.no_grad():
        net(x)  # a weight without a history
    model = tq.quantize(net, "w8a8", x)
    for module in (net, model):
        module[0].weight_u.copy_(torch.ones(4) / 2)
    tq.set_qmodule_state(model.train(), S.QUANT_AWARE_TRAIN)
    model(x).sum().backward()
    net.train()(x)
    assert torch.allclose(model[0].weight_u, net[0].weight_u)
    assert model[0].weight_orig.grad.any()


def test_hooks_of_the_layer_and_of_the_wrapper_are_called_once_in_every_state() -> None:
    x, calls = torch.randn(3, 6), []
    for layer in (nn.Linear(6, 4), nn.LSTM(6, 4)):
        model = calibrated(nn.Sequential(layer), x)
        model[0].register_forward_hook(lambda *_: calls.append("wrapper"))
        model[0].layer.register_forward_hook(lambda *_: calls.append("layer"))
        model[0].layer.register_forward_pre_hook(lambda *_: calls.append("before"))
        for state in S:
            tq.set_qmodule_state(model, state)
            calls.clear()
            model(x)
            assert calls == ["before", "layer", "wrapper"], state


def test_a_hook_of_the_layer_computes_its_weight_before_it_is_quantized() -> None:
    model = calibrated(nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6))

    def from_a_quarter(layer: nn.Module, args: Any) -> None:
        layer.weight = layer.quarter * 4.0

    layer = model[0].layer
    layer.quarter = nn.Parameter(layer.weight.detach() / 4)
    del layer.weight
    layer.register_forward_pre_hook(from_a_quarter)
    tq.set_qmodule_state(model.train(), S.QUANT_AWARE_TRAIN)
    model(torch.randn(3, 6)).sum().backward()
    assert "0.quarter" in dict(model.named_parameters())
    assert layer.quarter.grad.any()


def test_parametrizations_are_registered_on_the_layer() -> None:
    class Positive(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.abs()

    x = torch.rand(3, 6)
    model = calibrated(nn.Sequential(nn.Linear(6, 4, bias=False)), x)
    with pytest.raises(ConfigError, match=r"give register_parametrization the layer of the QWrapper \(module.layer\)"):
        parametrize.register_parametrization(calibrated(nn.Sequential(nn.Linear(6, 4)), x)[0], "weight", Positive())
    parametrize.register_parametrization(model[0].layer, "weight", Positive())
    assert "0.parametrizations.weight.original" in model.state_dict()
    tq.set_qmodule_state(model.train(), S.QUANT_AWARE_TRAIN)
    y = model(x)
    assert (y >= 0).all()
    y.sum().backward()
    assert model[0].parametrizations.weight.original.grad.any()
    parametrize.remove_parametrizations(model[0].layer, "weight")
    assert "0.weight" in model.state_dict()
    assert (model(x) >= 0).all()


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4-lsq", [{"weight": "ttq/channel", "input": "lsq:4"}]])
def test_an_average_made_before_calibration_is_evaluated(scheme: Any, use_buffers: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 6)
    model = tq.quantize(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), scheme, x)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    tq.set_qmodule_state(model.train(), S.QUANT_AWARE_TRAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    tq.set_qmodule_state(average.eval(), S.QUANT_EVAL)
    tq.set_qmodule_state(model.eval(), S.QUANT_EVAL)
    assert all(row.calibrated for row in tq.state_report(average))
    assert torch.allclose(average(x), model(x), atol=0.05)
    compiled = torch.compile(copy.deepcopy(average), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), average(x), atol=1e-6)


def test_statistics_written_into_the_buffers_count_also_for_the_sign() -> None:
    source, target = LSQQuantizer(4, signed=None), LSQQuantizer(4, signed=None)
    source.pre_observe(torch.rand(50))
    for ours, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        ours.copy_(theirs)
    assert target.is_ready
    x = torch.rand(20)
    assert target.code_range == source.code_range == (0, 15)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("spec", ["lsq:4", "lsqplus:4,offset", "pact:4", "tqt:4", "ttq", "apot:4", "codebook:2,learn"])
def test_learned_numbers_have_a_dimension(spec: str) -> None:
    site = "output" if spec.startswith(("pact", "lsqplus")) else "weight"
    quantizer = tq.make_quantizer(spec, site=site)
    quantizer.pre_observe(torch.randn(40))
    parameters = dict(quantizer.named_parameters())
    assert parameters
    assert all(p.ndim == 1 for p in parameters.values())
    assert quantizer(torch.tensor(0.3)).shape == ()
    quantizer(torch.randn(40)).sum().backward()
    old = {key: v.view(()) if key in parameters and v.numel() == 1 else v for key, v in quantizer.state_dict().items()}
    fresh = tq.make_quantizer(spec, site=site)
    fresh.load_state_dict(old)
    x = torch.randn(30)
    assert torch.equal(fresh(x), quantizer(x))


def test_a_wrapper_is_copied_and_pickled_after_a_backward_pass() -> None:
    x = torch.randn(3, 6)
    model = QWrapper(weight_norm(nn.Linear(6, 4)), tq.make_quantizer("affine:8,symmetric=narrow/channel"), None)
    tq.set_qmodule_state(model, S.QUANT_AWARE_TRAIN)
    model(x).sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        other(x).sum().backward()
        assert other.weight_g.grad.any()
        assert other._parameters is other.layer._parameters
        assert other._parameters is not model._parameters


def test_a_whole_model_goes_through_a_file() -> None:
    x = torch.randn(2, 5, 8)
    model = calibrated(Attention().eval(), x)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    loaded.double()
    assert loaded(x.double()).dtype == torch.float64


def test_mode_initialization_and_functional_calls_reach_the_layer() -> None:
    x = torch.randn(2, 5, 8)
    model = calibrated(Attention().eval(), x)
    model.train()
    assert model.attention.layer.training
    model.attention.training = False
    assert not model.attention.layer.training

    def zero(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    model.apply(zero)
    assert not model.head.weight.any()
    doubled = {name: parameter * 2 for name, parameter in model.named_parameters()}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, doubled, (x,))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_repr_shows_the_layer() -> None:
    model = calibrated(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))
    assert "(layer): Linear(in_features=3, out_features=2, bias=True)" in repr(model)


def test_a_language_model_with_a_tied_head_is_saved(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=37, tie_word_embeddings=True, **sizes))
    tokens = torch.randint(37, (2, 5))
    model = tq.quantize(net.eval(), "w8a8", {"input_ids": tokens})
    model.save_pretrained(tmp_path)
    saved = safetensors.load_file(next(tmp_path.glob("*.safetensors")))
    assert [name for name, tensor in saved.items() if tensor.shape == (37, 16)] == ["model.embed_tokens.weight"]
    model.lm_head.weight = nn.Parameter(torch.zeros(37, 16))
    model.tie_weights()
    assert model.get_input_embeddings().weight is model.lm_head.weight
    loaded = transformers.LlamaForCausalLM(net.config)
    kept = {key: value for key, value in saved.items() if key in loaded.state_dict()}
    loaded.load_state_dict(kept | {"lm_head.weight": saved["model.embed_tokens.weight"]})
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
