"""The mixture of quantized tensors against the sum written out, whichever way it takes; and what the ways rest on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchquant as tq
from benchmarks import search_step
from benchmarks.models import build_float, image_batch
from benchmarks.qat_step import TrainingStep
from benchmarks.saved_bytes import saved_bytes
from torchquant import kernels
from torchquant.errors import ConfigError, NoCodesError
from torchquant.quantizers import QUANTIZERS, GroupQuantizer, Quantizer, make_quantizer
from torchquant.quantizers_functional import residual_alphas
from torchquant.quantizers_functional._levels import nearest_level
from torchquant.quantizers_functional._row_statistics import row_mean_squares, row_sums, row_sums_of, shared_sums
from torchquant.search.learning import mixing
from torchquant.search.learning._steps import MOST_PLACES, Cells, steps_of
from torchquant.search.learning.mixing import mix
from torchquant.search.learning.mixture import MixtureQuantizer

PLAIN = ("affine:4", "ul2q:4", "vecq:4@clipped", "clipq:4", "zoomq:4", "esb:4,k=1", "pot0:4@clipped", "residual:4")
ANY = ("affine:4@clipped", "lsq:3", "ternary", "affine:4@ewgs", "tqt:4", "apot:4")
DIRECT, TABLE, FUSED = "_MixedBackward", "_LookedBackward", "_FusedBackward"


def observed(specs: tuple[str, ...], x: Tensor, site: str = "weight") -> list[Quantizer]:
    quantizers = [make_quantizer(spec, site) for spec in specs]
    for quantizer in quantizers:
        quantizer.pre_observe(x)
    return quantizers


def leaves(n: int, shape: tuple[int, ...] = (4, 8, 6, 6), scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return (torch.randn(shape) * scale).requires_grad_(), torch.softmax(torch.randn(n), 0).requires_grad_()


def gradients(y: Tensor, x: Tensor, shares: Tensor, quantizers: list[Quantizer]) -> list[Tensor]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    inputs = [x, shares, *(p for q in quantizers for p in q.parameters())]
    return list(torch.autograd.grad(y, inputs, upstream))


def written_out(x: Tensor, quantizers: list[Quantizer], shares: Tensor) -> Tensor:
    return torch.stack([share * q(x) for q, share in zip(quantizers, shares, strict=True)]).sum(0)


@pytest.fixture(params=[DIRECT, TABLE, FUSED])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(mixing, "TABLE_PAYS", 0 if request.param == TABLE else math.inf)
    if request.param != FUSED:
        monkeypatch.setattr(mixing, "members_of", lambda *_: None)
    elif kernels.find("mixture", torch.ones(1)) is None:
        pytest.skip("there are no compiled kernels here")
    return request.param


def test_both_ways_give_the_sum_and_its_gradients(way: str) -> None:
    x, shares = leaves(len(PLAIN), scale=2.0)
    quantizers = observed(PLAIN, x / 2)
    y = mix(x, quantizers, shares)
    assert type(y.grad_fn).__name__ == way
    wide = torch.stack([q(x).detach().double() * s for q, s in zip(quantizers, shares.double(), strict=True)]).sum(0)
    torch.testing.assert_close(y, wide.float(), rtol=1e-6, atol=1e-6)
    expected = gradients(written_out(x, quantizers, shares), x, shares, quantizers)
    for found, known in zip(gradients(y, x, shares, quantizers), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_whatever_the_estimator_the_type_and_what_is_learned(dtype: torch.dtype) -> None:
    x, shares = leaves(len(ANY))
    quantizers = observed(ANY, x)
    x = (2 * x).detach().to(dtype).requires_grad_()
    y = mix(x, quantizers, shares)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6}.get(dtype, 3e-2)
    naive = written_out(x, quantizers, shares)
    torch.testing.assert_close(y, naive.to(dtype), rtol=tolerance, atol=tolerance)
    expected = gradients(naive, x, shares, quantizers)
    found = gradients(y, x, shares, quantizers)
    assert len(found) == 2 + 3
    for own, known in zip(found, expected, strict=True):
        torch.testing.assert_close(own, known, rtol=tolerance, atol=tolerance * float(known.abs().max()))


@pytest.mark.parametrize(
    ("wants_x", "wants_shares", "learns"),
    [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)],
)
def test_only_what_is_asked_for_gets_a_gradient(wants_x: int, wants_shares: int, learns: int) -> None:
    specs = ("affine:4/channel", "clipq:4/channel", "lsq:4/channel")
    x, shares = leaves(3)
    quantizers = observed(specs, x)
    x, shares = x.detach().requires_grad_(bool(wants_x)), shares.detach().requires_grad_(bool(wants_shares))
    quantizers[2].requires_grad_(bool(learns))
    wanted = [t for t in (x, shares, *quantizers[2].parameters()) if t.requires_grad]
    y = mix(x, quantizers, shares)
    assert y.requires_grad == bool(wanted)
    if wanted:
        naive = torch.autograd.grad(written_out(x, quantizers, shares).square().sum(), wanted)
        for found, known in zip(torch.autograd.grad(y.square().sum(), wanted), naive, strict=True):
            torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)


def test_a_single_quantizer_is_called_as_it_is() -> None:
    x, shares = leaves(1)
    (quantizer,) = observed(("clipq:4/channel",), x)
    y = mix(x, [quantizer], shares)
    assert torch.equal(y, quantizer(x))
    y.sum().backward()
    assert shares.grad is None
    with pytest.raises(ConfigError, match=r"2 quantizers need as many shares, got shape \(1,\)"):
        mix(x, [quantizer, quantizer], shares)


def test_a_share_of_one_gives_that_quantizer_bit_for_bit(way: str) -> None:
    x, _ = leaves(1)
    quantizers = observed(PLAIN, x)
    for i, quantizer in enumerate(quantizers):
        shares = torch.eye(len(PLAIN))[i].requires_grad_()
        y = mix(x, quantizers, shares)
        assert type(y.grad_fn).__name__ == way
        assert torch.equal(y, quantizer(x))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_layouts(way: str, layout: str) -> None:
    x = torch.randn(4, 8, 6, 6)
    quantizers = observed(PLAIN[:4], x)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    known = gradients(written_out(x.requires_grad_(), quantizers, shares), x, shares, [])
    laid = {
        "channels_last": lambda: x.detach().contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2),
        "strided": lambda: x.detach().repeat_interleave(2, -1)[..., ::2],
    }[layout]().requires_grad_()
    y = mix(laid, quantizers, shares)
    assert layout == "strided" or y.stride() == laid.stride()
    torch.testing.assert_close(y, written_out(x, quantizers, shares))
    for found, expected in zip(gradients(y, laid, shares, []), known, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clamp", [(0.0, None), (0.0, 1.5), (None, 0.7)])
@pytest.mark.parametrize("n", [1, 8])
def test_a_clamp_in_the_same_pass(way: str, clamp: tuple[float | None, float | None], n: int) -> None:
    x, shares = leaves(n, scale=2.0)
    quantizers = observed(PLAIN[-n:], x.detach().clamp(*clamp))
    y = mix(x, quantizers, shares, clamp)
    assert n == 1 or type(y.grad_fn).__name__ == way
    expected = written_out(x.clamp(*clamp), quantizers, shares if n > 1 else torch.ones(1))
    torch.testing.assert_close(y, expected)
    inputs = [x, shares] if n > 1 else [x]
    found, known = (torch.autograd.grad(t.square().sum(), inputs) for t in (y, expected))
    for own, naive in zip(found, known, strict=True):
        torch.testing.assert_close(own, naive, rtol=1e-5, atol=1e-4)


def test_memory_for_backward_does_not_grow_with_the_quantizers(way: str) -> None:
    x, _ = leaves(1, (4, 32, 32, 32))
    kept = {}
    for n in (3, 8):
        quantizers = observed((*PLAIN[1:4], *PLAIN[4:])[:n] if n < 8 else PLAIN, x)
        shares = torch.full((n,), 1 / n, requires_grad=True)
        held = [x, shares, *(b for q in quantizers for b in q.buffers())]
        kept[n] = saved_bytes(lambda q=quantizers, s=shares: mix(2 * x, q, s), exclude=held)
    per_element = {DIRECT: 4, TABLE: 2, FUSED: 4}[way] * x.numel()
    tables = 2**19 if way == TABLE else 0
    assert per_element <= kept[3] <= kept[8] <= per_element + tables


def test_the_gradient_is_that_of_the_forward_though_statistics_have_moved_on() -> None:
    x, shares = leaves(2)
    quantizers = observed(("affine:2@clipped", "clipq:2"), x, site="output")
    expected = gradients(written_out(x, quantizers, shares), x, shares, [])
    y = mix(x, quantizers, shares)
    for quantizer in quantizers:
        quantizer.pre_observe(x / 100)
    for found, known in zip(gradients(y, x, shares, []), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(gradients(written_out(x, quantizers, shares), x, shares, [])[0], expected[0])


def test_compiled_it_is_the_same() -> None:
    x, shares = leaves(3, (4, 6, 5, 5))
    quantizers = observed(("affine:4", "lsq:4/channel", "clipq:4/channel"), x)
    expected = mix(x, quantizers, shares)
    compiled = torch.compile(lambda x, shares: mix(x, quantizers, shares), fullgraph=True, backend="aot_eager")
    y = compiled(x, shares)
    torch.testing.assert_close(y, expected)
    known = gradients(expected, x, shares, quantizers)
    for found, eager in zip(gradients(y, x, shares, quantizers), known, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_passes_and_inf_saturates(way: str, bad: float) -> None:
    x, shares = leaves(4)
    quantizers = observed(PLAIN[:4], x)
    x = x.detach().clone()
    x[1, 2, 3, 4] = bad
    y = mix(x, quantizers, shares)
    assert torch.equal(y.isnan(), x.isnan())
    torch.testing.assert_close(y, written_out(x, quantizers, shares), equal_nan=True)


def test_far_out_the_table_holds_the_last_level() -> None:
    x = torch.tensor([-3e37, -1e20, -50.0, 50.0, 1e20, 3e37]).repeat(1000)
    quantizers = observed(PLAIN, torch.randn(1000))
    steps = steps_of(quantizers)
    assert steps is not None
    cells = Cells.over(steps.edges)
    assert cells is not None
    index = cells.bins[cells.place(x).long()]
    for quantizer, values in zip(quantizers, steps.values, strict=True):
        assert torch.equal(values[index], quantizer(x))


CASES = [
    pytest.param(name, i, axis, id=f"{name}-{i}-{'tensor' if axis is None else 'channel'}")
    for name in QUANTIZERS
    for axis in (None, 0)
    for i in range(len(QUANTIZERS[name].examples(axis)))  # type: ignore[attr-defined]
]


@pytest.mark.parametrize(("name", "i", "axis"), CASES)
def test_levels_change_at_the_thresholds(name: str, i: int, axis: int | None) -> None:
    """Or there are none: levels in other units, or of each block."""
    quantizer = QUANTIZERS[name].examples(axis)[i]  # type: ignore[attr-defined]
    x = torch.randn(6, 4000)
    quantizer.pre_observe(x.abs() if quantizer.signed is False else x)
    data = torch.cat([x, 8 * x, x / 64], 1)
    if not quantizer.is_idempotent or quantizer.about.granularity == ("block",):
        with pytest.raises(NoCodesError, match="has no thresholds between its levels"):
            quantizer.thresholds()
        return
    levels, thresholds = quantizer.levels(), quantizer.thresholds()
    assert thresholds.dtype == torch.float32
    assert thresholds.shape == (*levels.shape[:-1], levels.shape[-1] - 1)
    assert (thresholds.diff() >= 0).all()
    rows = data if axis == 0 else data.reshape(1, -1)
    index = torch.searchsorted(thresholds.reshape(len(rows), -1).contiguous(), rows)
    expected = levels.reshape(len(rows), -1).gather(1, index).view(data.shape)
    assert (expected != quantizer(data)).float().mean() < 1e-4


def test_groups_have_no_thresholds() -> None:
    quantizer = GroupQuantizer(make_quantizer("clipq:4/channel"), 4)
    quantizer.pre_observe(torch.randn(2, 8))
    with pytest.raises(NoCodesError, match="each block has levels of its own"):
        quantizer.thresholds()


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_a_staircase_is_the_quantizers_or_none(name: str) -> None:
    """With values and gradients bit for bit; and there is one for every format with one list of levels."""
    x = torch.randn(40_000)
    for quantizer in QUANTIZERS[name].examples():  # type: ignore[attr-defined]
        quantizer.pre_observe(x.abs() if quantizer.signed is False else x)
        steps = steps_of([quantizer])
        if steps is None:
            continue
        data = (4 * x).requires_grad_()
        y = quantizer(data)
        (slope,) = torch.autograd.grad(y, data, torch.ones_like(y))
        index = torch.bucketize(data.detach(), steps.edges)
        assert (steps.values[0][index] != y).float().mean() < 2e-4
        slopes = torch.ones_like(steps.values) if steps.slopes is None else steps.slopes
        assert (slopes[0][index] != slope).float().mean() < 2e-4


WITH_STEPS = (
    "affine",
    "clipq",
    "esb",
    "minifloat",
    "nf4",
    "pot",
    "qfmt",
    "residual",
    "ternary",
    "ul2q",
    "vecq",
    "zoomq",
)


@pytest.mark.parametrize("name", WITH_STEPS)
@pytest.mark.parametrize("gradient", ["ste", "clipped"])
def test_these_schemes_have_a_staircase(name: str, gradient: str) -> None:
    quantizer = QUANTIZERS[name].examples()[0]  # type: ignore[attr-defined]
    quantizer.set_gradient(gradient)
    quantizer.pre_observe(torch.randn(4000))
    steps = steps_of([quantizer])
    assert steps is not None
    assert (steps.slopes is None) == (gradient == "ste")


class Lying(tq.ESBQuantizer):
    """Says that its levels change elsewhere."""

    def thresholds(self) -> Tensor:
        return super().thresholds() * 1.1


def test_who_claims_wrong_thresholds_is_found_out() -> None:
    honest, lying = tq.ESBQuantizer(4, 1), Lying(4, 1)
    for quantizer in (honest, lying):
        quantizer.force(0.5)
    assert steps_of([honest]) is not None
    assert steps_of([lying]) is None


@pytest.mark.parametrize(
    "spec", ["lsq:4", "pact:4", "affine:4@ewgs", "dorefa:4", "mxfp4", "codebook:4", "clipq:4/channel"]
)
def test_these_are_not_looked_up(spec: str) -> None:
    site = "output" if spec.startswith("pact") else "weight"
    assert steps_of(observed((spec, "affine:4"), torch.randn(4, 32), site)) is None


@pytest.mark.parametrize("n", [2, 3, 40, 300])
def test_cells_find_what_bucketize_finds(n: int) -> None:
    edges = torch.cat([torch.randn(n), torch.randn(n // 4) * 0.1]).unique()
    cells = Cells.over(edges)
    assert cells is not None
    assert len(cells.bins) <= MOST_PLACES
    x = torch.cat([torch.randn(50_000), edges, torch.tensor([-math.inf, math.inf, 3e38, -3e38, 0.0])])
    for data in (x, x.nextafter(torch.tensor(math.inf)), x.nextafter(torch.tensor(-math.inf))):
        point = cells.place(data)
        assert torch.equal(point, point.to(torch.int16).to(point.dtype))
        assert torch.equal(cells.bins[point.long()], torch.bucketize(data, edges))


def test_edges_too_close_for_cells() -> None:
    assert Cells.over(torch.cat([1 + torch.arange(40) * 1e-6, torch.tensor([1e3])])) is None
    assert Cells.over(torch.tensor([1.0])) is None


@pytest.mark.parametrize("n_levels", [2, 3, 13, 16, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_tree_of_levels_is_a_binary_search(n_levels: int, dtype: torch.dtype, axis: int | None) -> None:
    x = torch.randn(8, 16, 20, 20, dtype=dtype)
    shape = () if axis is None else (x.shape[axis],)
    levels = torch.randn(*shape, n_levels, dtype=dtype).round(decimals=2).sort(-1).values  # some are equal
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    moved = x if axis is None else x.movedim(axis, 0)
    with torch.no_grad():
        moved[0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, float(middles.flatten()[0])])
    rows = moved.reshape(1 if axis is None else len(moved), -1)
    expected = torch.searchsorted(middles.reshape(len(rows), -1).contiguous(), rows).view(moved.shape)
    found = nearest_level(x, levels, axis)
    assert found.dtype == torch.int64
    assert torch.equal(found if axis is None else found.movedim(axis, 0), expected)


def test_residual_scales_do_not_depend_on_autocast_and_equal_rows_get_equal_ones() -> None:
    x = torch.randn(20, 9)
    twice = torch.cat([x, x.flip(0)])
    expected = residual_alphas(twice, 4)
    assert torch.equal(expected[:20], expected[20:].flip(0))
    assert torch.equal(expected[7:8], residual_alphas(x[7:8], 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(residual_alphas(twice, 4), expected)


@pytest.mark.parametrize("axis", [None, 0])
def test_shared_sums_are_those_of_each_alone(axis: int | None) -> None:
    granularity = "channel" if axis == 0 else "tensor"
    specs = [f"{name}:4/{granularity}" for name in ("vecq", "ul2q", "clipq", "pot", "pot0")]
    x, other = torch.randn(6, 300), torch.randn(6, 300)
    shared = [make_quantizer(spec) for spec in specs]
    with shared_sums():
        for tensor in (other, x, x.clone().mul_(2.0)):
            for quantizer in shared:
                quantizer.pre_observe(tensor)
            x.add_(0.5)  # in place: what was kept of it no longer holds
        for quantizer in shared:
            quantizer.pre_observe(x)
            row_mean_squares(x.view(1, -1) if axis is None else x).zero_()  # as merging ranks may
    for quantizer, alone in zip(shared, observed(tuple(specs), x), strict=True):
        assert all(map(torch.equal, quantizer.buffers(), alone.buffers()))


@pytest.mark.parametrize("n", [100, 2**18 + 300])
def test_sums_in_pieces_are_the_sums(n: int) -> None:
    row = torch.randn(1, n)
    found = row_sums_of(lambda x: (x.square(), x.abs()), row)
    assert torch.equal(found[0], row_sums(row.square()))
    assert torch.equal(found[1], row_sums(row.abs()))


def test_a_search_step_of_the_benchmark_trains_everything() -> None:
    net = build_float("mobilenet_v2", 32)
    model = search_step.build(net, ["clipq:4/channel", "pot:4/channel"], ["affine:4", "ul2q:4", "zoomq:4"])
    step = TrainingStep(model, *image_batch(2, 32))
    step()
    assert step.void_because() == ""
    assert sum(isinstance(m, MixtureQuantizer) for m in model.modules()) > 100


def test_it_can_be_copied_and_saved_between() -> None:
    x, shares = leaves(2)
    quantizers = observed(("clipq:4", "lsq:4"), x)
    again = copy.deepcopy(quantizers)
    assert torch.equal(mix(x, quantizers, shares), mix(x, again, shares))


class Watching(TorchDispatchMode):
    """Runs every operation as it is."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("clamp", [None, (0.0, 1.5)])
def test_backward_without_the_kernel_of_forward(clamp: Any) -> None:
    """Modes and batches of gradients that come in backward alone are served by PyTorch's operators."""
    if kernels.find("mixture", torch.ones(1)) is None:
        pytest.skip("there are no compiled kernels here")
    specs = [f"{spec.partition('@')[0]}/channel{spec[len(spec.partition('@')[0]) :]}" for spec in PLAIN]
    x, shares = leaves(len(PLAIN), scale=2.0)
    quantizers = observed((*specs[:5], *PLAIN[5:]), x / 2)
    known = gradients(mix(x, quantizers, shares, clamp), x, shares, [])
    y = mix(x, quantizers, shares, clamp)
    assert type(y.grad_fn).__name__ == FUSED
    for quantizer in quantizers:
        quantizer.pre_observe(x * 3.0)  # only what the quantizers were in forward counts
    with Watching():
        found = gradients(y, x, shares, [])
    assert torch.equal(found[0], known[0])
    torch.testing.assert_close(found[1], known[1], rtol=1e-5, atol=1e-4)
    upstream = torch.randn(2, *y.shape)
    y = mix(x, quantizers, shares, clamp)
    many = torch.autograd.grad(y, (x, shares), upstream, retain_graph=True, is_grads_batched=True)
    for i in range(2):
        one = torch.autograd.grad(y, (x, shares), upstream[i], retain_graph=True)
        for batched, expected in zip(many, one, strict=True):
            torch.testing.assert_close(batched[i], expected, rtol=1e-5, atol=1e-4)
