"""The C++ kernel of a mixture equals the pure PyTorch code, its values and the gradient of x bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Kernels
from tests.kernels.tensors import SIZES, hard, is_same, shifted
from torchquant import kernels
from torchquant.quantizers import Quantizer, make_quantizer
from torchquant.quantizers_functional import KERNELS, UniformGrid
from torchquant.search.learning import mixing
from torchquant.search.learning._members import members_of
from torchquant.search.learning.mixing import mix

SPECS = (
    *("affine:4@clipped", "qfmt:3,signed", "affine:2,symmetric=narrow@clipped", "ul2q:4@clipped", "vecq:3", "clipq:4"),
    *("zoomq:4@clipped", "esb:4,k=1@clipped", "esb:4,k=1,center@clipped", "pot0:4", "pot:3@clipped", "ternary@clipped"),
    *("resq:4@clipped", "residual:2", "minifloat:8,e=4,m=3@clipped"),
)
CLAMPS = (None, (0.0, None), (0.0, 1.5), (-0.3, 0.7))


def fitted(granularity: str, x: Tensor, specs: tuple[str, ...] = SPECS) -> list[Quantizer]:
    quantizers = []
    for spec in specs:
        scheme, at, gradient = spec.partition("@")
        quantizers.append(make_quantizer(f"{scheme}/{granularity}{at}{gradient}").to(x.device))
        quantizers[-1].pre_observe(x)
    return quantizers


def mixed(x: Tensor, quantizers: list[Quantizer], clamp: Any = None) -> tuple[str, list[Tensor]]:
    """Return how x was mixed, and the value, the gradient of x and that of the shares."""
    generator = torch.Generator().manual_seed(1)
    leaf = x.detach().requires_grad_()
    shares = torch.rand(len(quantizers), generator=generator).to(x.device).requires_grad_()
    y = mix(leaf, quantizers, shares, clamp)
    grad = torch.randn(y.shape, generator=generator).to(x.device)
    return type(y.grad_fn).__name__, [y.detach(), *torch.autograd.grad(y, [leaf, shares], grad)]


def check(
    x: Tensor, quantizers: list[Quantizer], cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch, clamp: Any = None
) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    name, (value, of_x, of_shares) = mixed(x, quantizers, clamp)
    assert name == "_FusedBackward"
    with torch.no_grad():
        assert is_same(
            mix(x, quantizers, torch.rand(len(SPECS), generator=torch.Generator().manual_seed(1)), clamp), value
        )
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": {}})
    check_reference(x, quantizers, clamp, value, of_x, of_shares)


def check_reference(
    x: Tensor, quantizers: list[Quantizer], clamp: Any, value: Tensor, of_x: Tensor, of_shares: Tensor
) -> None:
    """Check a value and gradients against those of the PyTorch code, which must be what runs now."""
    name, (expected, known_of_x, known_of_shares) = mixed(x, quantizers, clamp)
    assert name == "_MixedBackward"
    assert is_same(value, expected)
    if clamp is not None and None not in clamp:
        known_of_x[x.isnan()] = of_x[x.isnan()]  # hardtanh_backward answers differently in whole vectors and the rest
    assert is_same(of_x, known_of_x)
    torch.testing.assert_close(of_shares, known_of_shares, rtol=1e-4, atol=1e-4 * math.sqrt(x.numel()), equal_nan=True)


@pytest.fixture(autouse=True)
def without_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "TABLE_PAYS", math.inf)


def test_mixtures_per_tensor(cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizers = fitted("tensor", torch.randn(500) * 0.5)
    for clamp in CLAMPS:
        check(hard((777,)), quantizers, cpu_kernels, monkeypatch, clamp)
    for n in SIZES:
        check(shifted(hard((n,))), quantizers, cpu_kernels, monkeypatch)
    check(torch.randn(3, 4, 100, 101), quantizers, cpu_kernels, monkeypatch, (0.0, 1.0))


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (6, 70), (40, 3, 7, 7)])
def test_mixtures_per_channel(cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    quantizers = fitted(
        "channel", torch.randn(shape) * torch.linspace(0.1, 2.0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    )
    for clamp in CLAMPS[::2]:
        check(hard(shape), quantizers, cpu_kernels, monkeypatch, clamp)
        if len(shape) == 4:
            check(
                hard(shape).contiguous(memory_format=torch.channels_last), quantizers, cpu_kernels, monkeypatch, clamp
            )


def test_numbers_of_the_tensor_beside_numbers_of_channels(
    cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(len(SPECS), 12, 5)
    quantizers = [*fitted("channel", x)[::2], *fitted("tensor", x)[1::2]]
    check(x, quantizers, cpu_kernels, monkeypatch)


def test_gradients_do_not_depend_on_threads(cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    x, before = torch.randn(3, 70_001), torch.get_num_threads()
    quantizers = fitted("tensor", x)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(mixed(x, quantizers)[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for own in found[1:] for one, other in zip(own, found[0], strict=True))


def test_only_formats_with_a_kernel_of_their_own_are_members() -> None:
    x = torch.randn(4, 64)

    def are_members(*specs: str) -> bool:
        quantizers = [make_quantizer(spec) for spec in specs]
        for quantizer in quantizers:
            quantizer.pre_observe(x)
        return members_of(quantizers) is not None

    assert are_members("affine:4", "residual:3")
    assert are_members("affine:4/channel", "clipq:4")
    for spec in ("lsq:4", "affine:4@ewgs", "apot:4", "nf4", "mxfp4", "affine:4/group=8", "clipq:4/in_channel"):
        assert not are_members(spec, "affine:4/channel"), spec
    KERNELS.register(UniformGrid, "cpu")(lambda grid, x, want_inside, clamp: grid.project(x, want_inside, clamp))
    try:
        assert not are_members("affine:4", "clipq:4")
    finally:
        KERNELS.unregister(UniformGrid, "cpu")
