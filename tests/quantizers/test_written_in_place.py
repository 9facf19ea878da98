"""What a quantizer hands out is an ordinary tensor: writing to it in place gives the right values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.quantizers import QUANTIZERS
from torchquant.quantizers_functional import gradient_clip

SPECS = ["affine:4@" + name for name in ("ste", "clipped", "ewgs", "dsq", "pwl", "pwlc", "noise")]
SPECS += ["xnor@hardtanh", "xnor@approxsign", "codebook:2", "codebook:2,learn=true/channel", "lsq:4", "pact:4"]
SPECS += ["mxfp4", "affine:4/group=3", "dorefa:3"]


def written(quantizer: nn.Module, x: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = quantizer(x)
    mask = torch.arange(x.numel()).view(x.shape) % 3 == 0
    y = y.masked_fill_(mask, 0.0).mul_(2.0) if in_place else y.masked_fill(mask, 0.0).mul(2.0)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("text", SPECS)
def test_writing_in_place_is_as_writing_elsewhere(text: str) -> None:
    quantizer = tq.make_quantizer(text, site="output" if text.startswith("pact") else "weight")
    x = torch.randn(4, 7)
    quantizer.pre_observe(x)
    before = x.clone()
    torch.testing.assert_close(written(quantizer, x, True), written(quantizer, x, False), rtol=0, atol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_scheme_hands_out_a_tensor_that_may_be_written(name: str) -> None:
    for quantizer in QUANTIZERS[name].examples(None):
        x = torch.randn(4, 6, 5)
        x = x.abs() if quantizer.signed is False else x
        quantizer.pre_observe(x)
        torch.testing.assert_close(written(quantizer, x, True), written(quantizer, x, False), rtol=0, atol=0)


def test_a_clipped_gradient_leaves_the_input_alone() -> None:
    x = torch.randn(30)
    before = x.clone()
    results = [written(lambda x: gradient_clip(x, -1.0, 1.0), x, in_place) for in_place in (True, False)]  # type: ignore[arg-type]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("text", ["affine:4@clipped", "codebook:2", "mxfp4"])
def test_compiled_code_may_write_too(text: str) -> None:
    quantizer = tq.make_quantizer(text)
    x = torch.randn(4, 7)
    quantizer.pre_observe(x)

    def forward(x: Tensor) -> Tensor:
        return quantizer(x).masked_fill_(x.detach() < 0, 0.0)

    torch.compiler.reset()
    compiled, eager = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = torch.compile(forward, fullgraph=True, backend="aot_eager")(compiled)
    expected = forward(eager)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close((y, compiled.grad), (expected, eager.grad), rtol=0, atol=0)
