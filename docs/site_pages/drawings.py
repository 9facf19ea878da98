"""Draw schemes and gradient estimators as SVG, by running them."""

from __future__ import annotations

import io
import itertools
from typing import Any

import matplotlib
import torch

from torchquant._figures import new_figure
from torchquant.errors import ConfigError
from torchquant.quantizers import Quantizer, find_scheme, make_quantizer, scheme_entry, weight_spec
from torchquant.quantizers_functional import GRADIENTS

SPAN = 3.0
"""Largest magnitude that is drawn; the data are drawn from a normal distribution of deviation 1."""
WIDTHS = (3, 4, 2, 1, 8)
"""Widths that are tried for a drawing, the most readable first."""


def drawn_spec(scheme: str) -> str:
    """Return the spec, per tensor, of the quantizer that is drawn for a scheme."""
    names = (scheme, *scheme_entry(scheme).presets)
    for name, n_bits in itertools.product(names, WIDTHS):
        typical = (weight_spec(name, n_bits) or "").partition("/")[0]
        spec = typical if typical.startswith(name) else f"{name}:{n_bits}"
        try:
            _made(scheme, spec)
        except ConfigError:
            continue
        return spec
    raise ValueError(f"no spec of '{scheme}' at {WIDTHS} bits can be made")


def levels(scheme: str) -> bytes:
    """Draw real values against quantized ones, with every level as a tick, as an SVG file."""
    x = torch.linspace(-SPAN, SPAN, 1201)
    with torch.no_grad():
        y = _observed(_made(scheme, drawn_spec(scheme))).quantize(x)
    figure, axes = _axes("real value", "quantized value")
    axes.plot(x, x, color="#b8c4d6", linewidth=1)
    axes.plot(x, y, color="#2a5db0", linewidth=1.6)
    found = y.unique()
    axes.plot(torch.full_like(found, -SPAN), found, linestyle="none", marker="_", markersize=12, color="#d1495b")
    axes.set_title(f"{drawn_spec(scheme)}: {found.numel()} levels", fontsize=9)
    return _svg(figure)


def gradient(name: str) -> bytes:
    """Draw the derivative that a gradient estimator gives a 3-bit (or a 1-bit) quantizer, as an SVG file."""
    quantizer = _observed(make_quantizer(gradient_spec(name)))
    x = torch.linspace(-SPAN, SPAN, 1201, requires_grad=True)
    torch.manual_seed(0)
    (slope,) = torch.autograd.grad(quantizer.quantize(x).sum(), x)
    figure, axes = _axes("real value", "derivative")
    axes.plot(x.detach(), slope, color="#2a5db0", linewidth=1.6)
    axes.set_ylim(min(-0.1, 1.1 * float(slope.min())), max(1.2, 1.1 * float(slope.max())))
    axes.set_title(gradient_spec(name), fontsize=9)
    return _svg(figure)


def gradient_spec(name: str) -> str:
    """Return the spec of the quantizer that an estimator is drawn with: one of a format that it works on."""
    return f"binary:1@{name}" if "sign" in GRADIENTS[name].needs else f"affine:3,symmetric=narrow@{name}"


def _made(scheme: str, spec: str) -> Quantizer:
    slots = find_scheme(scheme)[0].sites
    return make_quantizer(spec, slots[0])


def _observed(quantizer: Quantizer) -> Quantizer:
    data = torch.randn(4096, generator=torch.Generator().manual_seed(0)).clamp(-SPAN, SPAN)
    quantizer.pre_observe(data)
    quantizer.post_observe(data)
    return quantizer


def _axes(x: str, y: str) -> tuple[Any, Any]:
    figure = new_figure(4.2, 2.6, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "torchquant"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
