"""Laws of any input: its form is kept, edges and numbers that are not finite are met."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from torchquant.errors import NoCodesError, NonFiniteError
from torchquant.quantizers._laws.case import DTYPES, Case, require


def keeps_form(case: Case) -> None:
    """Shape, dtype, device and memory format are kept; the input is not changed."""
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": lambda x: x.contiguous(),
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    }
    if case.sample.ndim == 4:
        layouts["channels_last"] = lambda x: x.contiguous(memory_format=torch.channels_last)
    for dtype in DTYPES:
        expected = case.observed(case.sample.to(dtype))
        for name, layout in layouts.items():
            x = layout(case.sample.to(dtype))
            before = x.clone()
            y = case.observed(x)
            require((y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device), f"{name} {dtype} changed form")
            require(torch.equal(x, before), f"a {name} input was changed in place")
            require(torch.equal(y, expected), f"a {name} input in {dtype} gives other values")
            require(name == "strided" or y.stride() == x.stride(), f"memory format: {x.stride()} became {y.stride()}")


def edge_cases(case: Case) -> None:
    """Zeros, constants, one channel of zeros, one element, none: finite, no warning."""
    sample = case.sample
    dead_channel = sample.clone()
    dead_channel.select(case.axis or 0, 0).zero_()
    inputs = {
        "zeros": torch.zeros_like(sample),
        "a constant": torch.full_like(sample, 0.7),
        "one slice of zeros": dead_channel,
        "huge values": sample.sign() * 3e38,
        "tiny values": sample * 1e-38,
        "denormal values": sample * 1e-42,
        "no elements": sample[..., :0] if case.axis != sample.ndim - 1 else sample[:0],
    }
    for name, x in inputs.items():
        if bool((sample >= 0).all()):
            x = x.abs()
        quantizer = copy.deepcopy(case.fresh) if x.numel() else case.observed
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantizer.pre_observe(x)
            y = quantizer(x)
        require(bool(torch.isfinite(y).all()), f"{name} gave a value that is not finite")
        require(y.shape == x.shape, f"{name} changed shape from {tuple(x.shape)} to {tuple(y.shape)}")
        require(name != "zeros" or not y.any(), "zeros did not give zeros")


def nonfinite(case: Case) -> None:
    """NaN passes through quantize and is refused by encode and by observers; Inf saturates."""
    x = case.sample.clone()
    x.flatten()[0] = float("nan")
    y = case.observed(x)
    require(torch.equal(y.isnan(), x.isnan()), "quantize did not pass NaN on, or made some")
    try:
        case.observed.encode(x)
    except NoCodesError:
        pass
    except NonFiniteError:
        pass
    else:
        require(False, "encode took NaN")
    x = case.sample.clone()
    x.flatten()[0], x.flatten()[-1] = float("inf"), float("-inf")
    y = case.observed(x)
    require(bool(torch.isfinite(y).all()), "Inf did not saturate")
    for real, quantized in zip(case.slices(x), case.slices(y), strict=True):
        for sign in (1.0, -1.0) if real.numel() else ():
            ends = (sign * quantized)[real == sign * torch.inf]
            require(bool((ends >= (sign * quantized).max()).all()), f"{sign * torch.inf} did not go to the last level")
    if not case.fresh.is_ready:
        for bad in (float("nan"), float("inf")):
            x.flatten()[0] = bad
            quantizer = copy.deepcopy(case.fresh)
            try:
                quantizer.pre_observe(x)
                refused = False
            except NonFiniteError:
                refused = True
            require(refused or getattr(quantizer, "nonfinite", "") == "ignore", f"pre_observe took {bad}")
