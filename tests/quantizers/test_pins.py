"""Pins: what keeps its numbers keeps them in every state, and wherever the model goes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError, NoCodesError, UnobservedRangeError
from torchquant.qmodule import QModuleState, QWrapper
from torchquant.quantizers import CodebookQuantizer, DoReFaQuantizer, GroupQuantizer, Quantizer
from torchquant.quantizers._token import TokenQuantizer
from torchquant.range_observers import OBSERVERS
from torchquant.range_observers._statistics import StatisticTracker
from torchquant.search import MixtureQuantizer

SPECS = (
    "affine:4/channel",
    "qfmt:4,signed,rule=mse",
    "esb:4,k=1,observer=mse/channel",
    "lsq:4/channel",
    "apot:4",
    "ttq/channel",
    "codebook:2,learn=true",
    "lsq:4/group=5",
    "dorefa:4",
    "mxfp4",
    "nvfp4",
)
X = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


def wrapped(spec: str) -> QWrapper:
    torch.manual_seed(0)
    return QWrapper(nn.Linear(12, 6), tq.make_quantizer(spec))


def pinned(spec: str) -> QWrapper:
    module = wrapped(spec)
    module.weight_quantizer.pin(module.float_weight())  # type: ignore[union-attr]
    return module


def grid_of(module: QWrapper) -> Tensor:
    """What the weight quantizer makes of a fixed tensor."""
    assert module.weight_quantizer is not None
    return module.weight_quantizer(X).detach()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("spec", SPECS)
def test_no_state_and_no_training_moves_what_is_pinned(spec: str) -> None:
    module = pinned(spec)
    expected, weight = grid_of(module), module.layer.weight.detach().clone()
    numbers = state_of(module.weight_quantizer)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    for state in QModuleState:
        tq.set_qmodule_state(module, state)
        module.train()(X).square().sum().backward()
        optimizer.step()
        tq.observe_weights(module)
    after = state_of(module.weight_quantizer)  # type: ignore[arg-type]
    assert all(torch.equal(after[key], value) for key, value in numbers.items())
    assert torch.equal(grid_of(module), expected)
    assert not torch.equal(module.layer.weight, weight)


@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_passes_a_pin(spec: str) -> None:
    module = pinned(spec)
    tq.set_qmodule_state(module, QModuleState.QUANT_AWARE_TRAIN)
    module(X).sum().backward()
    assert module.layer.weight.grad.any()
    assert all(p.grad is None for p in module.weight_quantizer.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("spec", SPECS)
def test_a_pin_goes_where_the_model_goes(spec: str) -> None:
    module = pinned(spec)
    tq.set_qmodule_state(module, QModuleState.QUANT_AWARE_TRAIN)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = wrapped(spec)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copies = (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module)))
    for other in copies:
        assert other.weight_quantizer.is_pinned
        tq.observe_weights(other)
        other(3 * X)
        assert torch.equal(grid_of(other), grid_of(module))
        learned = list(other.weight_quantizer.parameters())
        assert not any(p.requires_grad for p in learned)
        other.weight_quantizer.unpin()
        assert all(p.requires_grad for p in other.weight_quantizer.parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_a_checkpoint_without_pins_loads_as_ever(spec: str) -> None:
    free = wrapped(spec)
    tq.observe_weights(free)
    state = free.state_dict()
    assert not [key for key in state if key.endswith(("pinned", "block_scales"))]
    module = pinned(spec)
    module.load_state_dict(state)
    assert not module.weight_quantizer.is_pinned  # type: ignore[union-attr]
    assert module.state_dict().keys() == state.keys()
    assert all(p.requires_grad for p in module.parameters())
    assert torch.equal(grid_of(module), grid_of(free))


def test_a_float_checkpoint_leaves_pins() -> None:
    module = tq.quantize(nn.Sequential(nn.Linear(12, 6)), [{"weight": "affine:4/channel"}])
    (module,) = module
    module.weight_quantizer.pin(X)
    module.load_state_dict(nn.Linear(12, 6).state_dict(), strict=False)
    assert module.weight_quantizer.is_pinned


def test_what_was_frozen_before_stays_frozen() -> None:
    quantizer = tq.make_quantizer("lsqplus:4,offset=true")
    quantizer.pre_observe(X)
    quantizer.offset.requires_grad_(False)
    quantizer.pin(X)
    assert not quantizer.step.requires_grad
    quantizer.unpin()
    assert (quantizer.step.requires_grad, quantizer.offset.requires_grad) == (True, False)


@pytest.mark.parametrize("site", ["weight", "output"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_of_what_is_pinned_see_nothing(name: str, site: str) -> None:
    quantizer = tq.make_quantizer(f"affine:4,observer={name}", site)
    quantizer.pin(X)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    for factor in (5.0, 0.1):
        quantizer.pre_observe(factor * X, clamp=(0.0, None))  # type: ignore[call-arg]
        for part in quantizer.modules():
            if isinstance(part, StatisticTracker):
                part.observe_batch(factor * X)
    after = quantizer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_scheme_files_need_no_line_for_pins() -> None:
    class Own(Quantizer):
        """A scheme against the published contract, with a number that a loop trains and one that it measures."""

        n_bits = 2

        def __init__(self) -> None:
            super().__init__()
            self.largest = 1.0
            self.gain = nn.Parameter(torch.ones(()))

        def pre_observe(self, x: Tensor) -> None:
            self.largest = float(x.abs().max())

        def post_observe(self, x: Tensor) -> None:
            self.largest += 1.0

        def quantize(self, x: Tensor) -> Tensor:
            return x.sign() * self.largest * self.gain

    quantizer = Own()
    quantizer.pin(X)
    largest = quantizer.largest
    quantizer.pre_observe(5 * X)
    quantizer.post_observe(5 * X)
    assert quantizer.largest == largest
    assert not quantizer.gain.requires_grad
    assert torch.equal(quantizer.nearest(X[:, [3]], torch.tensor([3])), quantizer(X)[:, [3]])


@pytest.mark.parametrize("spec", ["affine:4/channel", "nvfp4", pytest.param("lsq:4", marks=pytest.mark.slow)])
def test_pinned_code_compiles_and_exports(spec: str) -> None:
    module = wrapped(spec)
    tq.observe_weights(module)
    tq.set_qmodule_state(module, QModuleState.QUANT_AWARE_TRAIN)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    compiled(X)
    module.weight_quantizer.pin(module.float_weight())  # type: ignore[union-attr]
    expected = grid_of(module)
    with torch.no_grad():
        module.layer.weight.mul_(3)
        assert torch.equal(compiled(X), module(X))
        assert torch.equal(torch.export.export(module, (X,)).module()(X), module(X))
    assert torch.equal(grid_of(module), expected)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "affine:4/channel"])
def test_half_types_keep_pins_exact(spec: str, half: torch.dtype) -> None:
    quantizer, weight = tq.make_quantizer(spec), torch.randn(4, 2049)
    quantizer.pin(weight)
    quantizer.to(half)
    assert quantizer.pinned.tolist() == [4.0, 2049.0]
    columns = torch.tensor([2048, 7])
    assert torch.equal(quantizer.nearest(weight[:, columns], columns), quantizer(weight)[:, columns])


@pytest.mark.parametrize("spec", ["mxfp4", "mxint8", "nvfp4", "nvfp4,block_axis=1", "mxfp8_e4m3,block_axis=0,block=2"])
def test_blocks_keep_their_scales_whatever_the_weight_becomes(spec: str) -> None:
    quantizer, weight = tq.make_quantizer(spec), torch.randn(4, 40)
    quantizer.pin(weight)
    levels = quantizer(weight)
    assert torch.equal(quantizer.encode(100 * weight) >> quantizer.n_bits, quantizer.encode(weight) >> quantizer.n_bits)
    below, above = quantizer.neighbours(weight)
    assert torch.equal(quantizer(below), below)
    assert torch.equal(quantizer(above), above)
    quantizer.set_numbers(**{name: number * 1 for name, number in quantizer.numbers().items()})
    assert torch.equal(quantizer(weight), levels)
    with pytest.raises(ConfigError, match="scales of .* blocks are pinned, and a tensor of shape"):
        quantizer(torch.randn(7, 50))


def test_numbers_can_be_set_while_they_are_pinned() -> None:
    quantizer = tq.make_quantizer("esb:3,k=0/channel")
    quantizer.pin(X)
    expected = 2 * quantizer(X)
    quantizer.set_numbers(alpha=2 * quantizer.numbers()["alpha"])
    assert torch.equal(quantizer(2 * X), expected)
    assert quantizer.is_pinned


def test_a_pin_may_keep_the_numbers_there_are() -> None:
    quantizer = tq.make_quantizer("affine:4")
    quantizer.pre_observe(X)
    expected = quantizer(X)
    quantizer.pin(9 * X, observe=False)
    assert torch.equal(quantizer(X), expected)


def test_what_was_pinned_in_inference_mode_trains() -> None:
    module = wrapped("nvfp4")
    with torch.inference_mode():
        module.weight_quantizer.pin(module.float_weight())  # type: ignore[union-attr]
    tq.set_qmodule_state(module, QModuleState.QUANT_AWARE_TRAIN)
    module(X).square().sum().backward()
    assert not any(buffer.is_inference() for buffer in module.buffers())


def test_a_weight_of_another_shape_takes_the_pin_off() -> None:
    module = pinned("affine:4/channel")
    module.weight = nn.Parameter(torch.randn(3, 12))
    assert not module.weight_quantizer.is_pinned  # type: ignore[union-attr]
    assert len(module.weight_quantizer.levels()) == 3  # type: ignore[union-attr]


def test_what_cannot_be_pinned_says_so() -> None:
    with pytest.raises(ConfigError, match="TokenQuantizer cannot be pinned: each token takes its numbers from its own"):
        TokenQuantizer(8).pin(X)
    with pytest.raises(ConfigError, match="a mixture cannot be pinned"):
        MixtureQuantizer(["clipq:2/channel", "esb:2,k=0/channel"]).pin(X)
    with pytest.raises(UnobservedRangeError, match="AffineQuantizer has no numbers to pin"):
        tq.make_quantizer("affine:4").pin(torch.zeros(0, 3))
    with pytest.raises(UnobservedRangeError, match="AffineQuantizer has no numbers to pin"):
        tq.make_quantizer("affine:4").pin(X, observe=False)
    for quantizer in (tq.make_quantizer("mxfp4"), tq.AffineQuantizer(4, tq.BatchMinMax(axis=1))):
        quantizer.pre_observe(X)
        with pytest.raises(NoCodesError, match=r"cannot quantize columns alone: .* Call pin\(weight\) first"):
            quantizer.nearest(X[:, :2], torch.arange(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ["twn", "twn/channel", "ttq", "twn/group=5"])
def test_ternary_scales_below_the_threshold_come_back(spec: str, dtype: torch.dtype) -> None:
    quantizer = tq.make_quantizer(spec)
    quantizer.pin(X)
    numbers = quantizer.numbers()
    quantizer.set_numbers(**{name: n if name.endswith("threshold") else n / 16 for name, n in numbers.items()})
    values = quantizer(X.to(dtype))
    assert not torch.equal(quantizer(values), values)
    assert torch.equal(quantizer(quantizer.preimage(values)), values)


@pytest.mark.parametrize("n_bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 12.0, 100.0])
def test_dorefa_has_a_weight_for_every_level(n_bits: int, size: float) -> None:
    quantizer = DoReFaQuantizer(n_bits)
    quantizer.pin(torch.tensor([-size, size / 3, size]))
    levels = quantizer.levels()[:: max(1, 2 ** (n_bits - 8))]
    assert torch.equal(quantizer(quantizer.preimage(levels)), levels)


def test_groups_and_codebooks_find_their_columns() -> None:
    grouped = [GroupQuantizer(tq.make_quantizer(f"{scheme}/channel"), 5) for scheme in ("twn", "dorefa:4", "dorefa:1")]
    for quantizer in (*grouped, CodebookQuantizer(2, axis=1)):
        quantizer.pin(X)
        columns = torch.tensor([11, 0, 4, 5])
        assert torch.equal(quantizer.nearest(X[:, columns], columns), quantizer(X)[:, columns])
