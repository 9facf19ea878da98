"""Formats as values: what `Quantizer.format()` gives is the quantizer without memory and gradient; the kernel seam."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

import torchquant as tq
from torchquant.errors import ConfigError, NameClashError, NoAffineViewError, NoCodesError
from torchquant.quantizers import QUANTIZERS, FittedQuantizer, Quantizer
from torchquant.quantizers_functional.affine import AffineParams
from torchquant.quantizers_functional.formats import Levels, UniformGrid
from torchquant.quantizers_functional.kernels import KERNELS
from torchquant.quantizers_functional.minifloat import FORMATS, ScaledFloat

CASES = [
    pytest.param(name, axis, i, id=f"{name}-{axis}-{i}")
    for name in QUANTIZERS
    for axis in (None, 0)
    for i in range(len(QUANTIZERS[name].examples(axis)))  # type: ignore[attr-defined]
]
GROUPED = ["affine:4,symmetric=narrow/group=16", "esb:4,k=1/group=7", "nf4/group=64"]


def observed(quantizer: Quantizer) -> tuple[Quantizer, Tensor]:
    x = torch.randn(5, 6, 40, generator=torch.Generator().manual_seed(1))
    x = x.abs() if quantizer.signed is False else x
    quantizer.pre_observe(x)
    return quantizer, torch.cat([x, 8 * x, x / 64], 2)


@pytest.mark.parametrize(("name", "axis", "i"), CASES)
def test_a_format_is_its_quantizer_without_memory_and_gradient(name: str, axis: int | None, i: int) -> None:
    quantizer, x = observed(QUANTIZERS[name].examples(axis)[i])  # type: ignore[attr-defined]
    with torch.no_grad():
        form, y = quantizer.format(), quantizer(x)
        assert torch.equal(form.project(x)[0], y)
        assert torch.equal(form.decode(form.encode(x)), y)
    assert torch.equal(form.encode(x), quantizer.encode(x))
    assert form.code_range == quantizer.code_range
    with pytest.raises(FrozenInstanceError):
        form.axis = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", GROUPED)
def test_the_format_of_groups(text: str) -> None:
    quantizer, x = observed(tq.make_quantizer(text))
    x = x[..., :40]
    form = quantizer.format()
    assert torch.equal(form.project(x)[0], quantizer(x))
    assert torch.equal(form.decode(form.encode(x)), quantizer(x))
    with pytest.raises(NoCodesError, match="no one list of levels"):
        quantizer.levels()
    with pytest.raises(NoAffineViewError, match="GroupQuantizer: .* not a uniform grid"):
        quantizer.affine_params()


def test_numbers_may_have_any_shape_that_broadcasts() -> None:
    x = torch.tensor([[0.3, -0.8], [2.4, 9.0]])
    scale = torch.tensor([[1.0], [2.0]])
    for whole, rows in (
        (ScaledFloat(scale, FORMATS["fp4_e2m1"]), [ScaledFloat(s, FORMATS["fp4_e2m1"]) for s in (1.0, 2.0)]),
        (UniformGrid(scale, 0, -2, 1), [UniformGrid(s, 0, -2, 1) for s in (1.0, 2.0)]),
    ):
        assert torch.equal(whole.project(x)[0], torch.stack([f.project(r)[0] for f, r in zip(rows, x, strict=True)]))
    assert Levels(torch.tensor([-1.0, 0.0, 3.0])).encode(x).tolist() == [[1, 0], [2, 2]]


@pytest.fixture
def kernel_calls() -> Iterator[list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []

    @KERNELS.register(UniformGrid, "cpu")
    def kernel(grid: UniformGrid, x: Tensor, want_inside: bool, clamp: Any) -> tuple[Tensor, Tensor | None]:
        calls.append((type(grid), x.dtype, want_inside, clamp))
        return grid.project(x, want_inside, clamp)

    yield calls
    KERNELS.unregister(UniformGrid, "cpu")


def test_a_kernel_stands_for_the_projection(kernel_calls: list[tuple[Any, ...]]) -> None:
    quantizer = tq.make_quantizer("affine:4@clipped", "output")
    x = torch.randn(40)
    quantizer.pre_observe(x)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf, clamp=(0.0, None))
    assert kernel_calls == [(UniformGrid, torch.float32, True, (0.0, None))]
    KERNELS.unregister(UniformGrid, "cpu")
    try:
        assert torch.equal(quantizer(x, clamp=(0.0, None)), y)
    finally:
        KERNELS.register(UniformGrid, "cpu")(lambda *_: (x, None))
    y.sum().backward()
    assert leaf.grad is not None
    assert len(kernel_calls) == 1


def test_a_kernel_is_for_one_format_and_device(kernel_calls: list[tuple[Any, ...]]) -> None:
    other = tq.make_quantizer("esb:4,k=1")
    x = torch.randn(40)
    other.pre_observe(x)
    other(x)
    assert kernel_calls == []
    assert KERNELS.find(UniformGrid, "cuda") is None
    with pytest.raises(NameClashError, match="UniformGrid has a kernel for 'cpu' already"):
        KERNELS.register(UniformGrid, "cpu")(lambda *_: (x, None))


def test_a_function_of_ones_own_counts_below_a_scheme_with_a_format() -> None:
    class Half(tq.ESBQuantizer):
        def project(self, x: Tensor, want_inside: bool, *numbers: Any) -> tuple[Tensor, Tensor | None]:
            return x / 2, None

    class Floor(tq.AffineQuantizer):
        def codes(self, x: Tensor, *numbers: Any) -> Tensor:
            delta, zero_point, low, high = numbers
            return torch.floor(x / delta).add(zero_point).clamp(low, high)

    class Doubled(tq.ESBQuantizer):
        def values(self, codes: Tensor, dtype: torch.dtype, *numbers: Any) -> Tensor:
            return codes.to(dtype) * numbers[0] * 2

    x = torch.randn(3, 40)
    half, floor = Half(4, 1), Floor(4, tq.BatchMinMax(0))
    half.pre_observe(x)
    assert torch.equal(half(x), x / 2)
    assert torch.equal(half.levels(), plain_levels(tq.ESBQuantizer(4, 1), x))
    floor.pre_observe(x)
    assert torch.equal(floor.decode(floor.encode(x)), floor(x))
    assert torch.equal(floor.levels(), plain_levels(tq.AffineQuantizer(4, tq.BatchMinMax(0)), x))
    delta = floor.affine_params().delta[:, None]
    inside = (x > floor.levels()[:, :1]) & (x < floor.levels()[:, -1:])
    assert bool(((x - floor(x))[inside] >= -1e-6).all())
    assert bool(((x - floor(x)) <= delta * 1.001)[inside].all())
    doubled = Doubled(4, 1)
    doubled.force(0.5)
    assert doubled.levels().tolist() == [float(code) for code in range(-7, 8)]
    assert set(doubled(x).unique().tolist()) <= set(doubled.levels().tolist())


def plain_levels(quantizer: tq.Quantizer, x: Tensor) -> Tensor:
    quantizer.pre_observe(x)
    return quantizer.levels()


def test_codes_and_values_of_ones_own_count_also_below_a_scheme_with_a_format() -> None:
    class Coarse(tq.ESBQuantizer):
        code_range = (-1, 1)

        def codes(self, x: Tensor, *numbers: Any) -> Tensor:
            return (x / numbers[0]).round().clamp(-1, 1)

        def values(self, codes: Tensor, dtype: torch.dtype, *numbers: Any) -> Tensor:
            return codes.to(dtype) * numbers[0]

    quantizer = Coarse(4, 1)
    quantizer.force(0.5)
    assert quantizer(torch.tensor([-9.0, 0.1, 0.3])).tolist() == [-0.5, 0.0, 0.5]
    assert quantizer.levels().tolist() == [-0.5, 0.0, 0.5]


def test_an_affine_view_of_ones_own_gives_integers_and_bytes() -> None:
    class Third(FittedQuantizer):
        statistics = ("alpha",)
        n_bits = 3
        code_range = (0, 7)

        def measure(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x.abs().amax(),)

        def codes(self, x: Tensor, *numbers: Any) -> Tensor:
            return (x / (numbers[0] / 3)).round().add_(4).clamp_(0, 7)

        def values(self, codes: Tensor, dtype: torch.dtype, *numbers: Any) -> Tensor:
            return (codes - 4).to(dtype) * (numbers[0] / 3)

        def affine_params(self) -> AffineParams:
            return AffineParams(self.get()[0] / 3, 4, 0, 7)

    quantizer, x = observed(Third())
    ((scale, table),) = quantizer.integer_terms()
    assert table.tolist() == list(range(-4, 4))
    assert float(scale) == float(quantizer.affine_params().delta)
    assert quantizer.side_bytes(x) == 5
    assert Third.is_uniform


@pytest.mark.parametrize(
    "text", ["affine:3", "esb:4,k=1/channel", "pot:3", "twn", "nf4/channel", "residual:2", "apot:4"]
)
def test_neighbours_are_found_in_the_list_of_levels(text: str) -> None:
    quantizer, x = observed(tq.make_quantizer(text))
    below, above = quantizer.neighbours(x)
    levels = quantizer.levels().reshape(-1, quantizer.levels().shape[-1])
    for i, known in enumerate(levels):
        rows = [t[i] if len(levels) > 1 else t for t in (x, below, above)]
        bounded, low, high = rows[0].clamp(known[0], known[-1])[..., None], rows[1], rows[2]
        beneath = torch.where(known <= bounded, known, -torch.inf).amax(-1)
        over = torch.where(known >= bounded, known, torch.inf).amin(-1)
        on_level = (beneath == over) | (low == high)
        assert torch.equal(low[~on_level], beneath[~on_level])
        assert torch.equal(high[~on_level], over[~on_level])


@pytest.mark.parametrize("text", [*GROUPED, "affine:4,symmetric=narrow/channel", "twn"])
def test_columns_alone_are_what_they_are_among_others(text: str) -> None:
    quantizer = tq.make_quantizer(text)
    weight = torch.randn(6, 43)
    quantizer.pre_observe(weight)
    columns = torch.tensor([0, 42, 7, 41, 16, 3])
    assert torch.equal(quantizer.nearest(weight[:, columns], columns), quantizer(weight)[:, columns])


def test_who_cannot_quantize_a_column_alone_says_so() -> None:
    with pytest.raises(NoCodesError, match="each block takes its scale from all of its elements"):
        tq.make_quantizer("mxfp4").nearest(torch.ones(2, 1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(NoCodesError, match="no neighbours: its levels are not in the units of x"):
        tq.make_quantizer("dorefa:4").neighbours(torch.ones(1))


@pytest.mark.parametrize(
    "text", ["affine:4", "esb:4,k=1/channel", "lsqplus:4,offset/channel", "codebook:2", GROUPED[1]]
)
def test_numbers_can_be_set(text: str) -> None:
    quantizer, x = observed(tq.make_quantizer(text))
    other = tq.make_quantizer(text)
    other.pre_observe(3 * x[..., :40])
    other.set_numbers(**quantizer.numbers())
    x = x[..., :40]
    assert torch.equal(other(x), quantizer(x))
    with pytest.raises(ConfigError, match="the numbers of .* are: .*; got wrong"):
        other.set_numbers(wrong=1.0)
