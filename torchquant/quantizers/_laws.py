"""The laws every quantizer must keep, as a function anybody can call on theirs."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError, LawViolation, NoCodesError, NonFiniteError, UnknownNameError
from torchquant.quantizers._base import Quantizer

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LawReport:
    """Which laws hold, and which could not be asked of this quantizer and why."""

    passed: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"holds    {name}" for name in self.passed]
        return "\n".join(lines + [f"skipped  {name}: {why}" for name, why in self.skipped.items()])


class _Skip(Exception):  # noqa: N818 - control flow, not an error
    pass


def _require(holds: bool, detail: str) -> None:
    if not holds:
        raise AssertionError(detail)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


class _Case:
    """A quantizer, unobserved and observed, with the data it saw."""

    def __init__(self, quantizer: Quantizer, sample: Tensor | None) -> None:
        self.fresh = copy.deepcopy(quantizer).cpu()
        self.sample = self._default_sample(quantizer) if sample is None else sample.detach().clone()
        self.axis = None if quantizer.axis is None else quantizer.axis % self.sample.ndim
        self.observed = copy.deepcopy(self.fresh)
        self.observed.pre_observe(self.sample)

    @staticmethod
    def _default_sample(quantizer: Quantizer) -> Tensor:
        axis = quantizer.axis
        x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
        x = x.abs() if quantizer.signed is False else x
        return x if axis is None else x.movedim(0, axis).contiguous()

    def wide(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sample, the same eight times too large, and the same very small; in blocks, one element each."""
        if self.observed.levels_vary:
            factors = torch.tensor([1.0, 8.0, 1.0 / 64])[torch.arange(self.sample.numel()) % 3]
            return (self.sample * factors.view_as(self.sample)).to(dtype)
        return torch.cat([self.sample, 8 * self.sample, self.sample / 64], self._free_axis()).to(dtype)

    def _free_axis(self) -> int:
        return self.sample.ndim - 1 if self.axis != self.sample.ndim - 1 else 0

    def slices(self, x: Tensor) -> list[Tensor]:
        """The parts of x that share parameters, flat."""
        return self.observed.parts(x)

    def n_bits(self) -> int:
        bits = getattr(self.observed, "n_bits", None)
        if not isinstance(bits, int):
            raise _Skip("it has no n_bits")
        return bits


def on_grid(case: _Case) -> None:
    """At most 2**n_bits distinct values, and `quantize(x) == decode(encode(x))`, in every type."""
    bits = case.n_bits()
    for dtype in DTYPES:
        x = case.wide(dtype)
        y = case.observed(x)
        distinct = max(part.unique().numel() for part in case.slices(y))
        _require(distinct <= 2**bits, f"{distinct} distinct values from {bits} bits in {dtype}")
        try:
            decoded = case.observed.decode(case.observed.encode(x), dtype)
        except NoCodesError:
            continue
        _require(torch.equal(decoded, y), f"decode(encode(x)) differs from quantize(x) in {dtype}")


def levels_used(case: _Case) -> None:
    """More than half of the 2**n_bits codes can be reached, and `levels()` lists what is."""
    bits = case.n_bits()
    if bits > 10:
        raise _Skip("more than 1024 levels")
    if case.observed.levels_vary:
        raise _Skip(f"each {case.observed.about.granularity[0]} has levels of its own")
    reach = 40.0 * float(case.sample.abs().max())
    ramp = torch.cat([torch.linspace(-1, 1, 4001) * reach / 8, reach * torch.logspace(-9, 0, 2000)])
    ramp = torch.cat([ramp, -ramp])
    shape = [1] * case.sample.ndim
    if case.axis is None:
        x = ramp
    else:
        shape[case.axis], shape[case._free_axis()] = case.sample.shape[case.axis], -1
        x = ramp.expand(shape[case.axis], -1)
        x = (x.T if case.axis > case._free_axis() else x).reshape(shape)
    y = case.observed(x)
    fewest = min(part.unique().numel() for part in case.slices(y))
    _require(fewest > 2**bits / 2, f"only {fewest} of {2**bits} levels are ever used")
    try:
        levels = case.observed.levels()
    except NoCodesError:
        return
    for part, known in zip(case.slices(y), levels if case.axis is not None else [levels], strict=True):
        _require(bool((known.diff() >= 0).all()), "levels() is not sorted")
        _require(bool(torch.isin(part.unique(), known).all()), "quantize gives a value that levels() does not list")


def idempotent(case: _Case) -> None:
    """Quantizing what is quantized changes nothing."""
    if not case.observed.is_idempotent:
        raise _Skip("its levels are not in the units of x")
    bits = getattr(case.observed, "n_bits", 8)
    for dtype in DTYPES if bits <= 8 else DTYPES[:2]:
        y = case.observed(case.wide(dtype))
        _require(torch.equal(case.observed(y), y), f"quantize(quantize(x)) differs from quantize(x) in {dtype}")


def monotone(case: _Case) -> None:
    """A larger input never gives a smaller output."""
    x = case.wide()
    for real, quantized in zip(case.slices(x), case.slices(case.observed(x)), strict=True):
        _require(bool((quantized[real.argsort()].diff() >= 0).all()), "a larger input gave a smaller output")


def keeps_form(case: _Case) -> None:
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
            _require((y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device), f"{name} {dtype} changed form")
            _require(torch.equal(x, before), f"a {name} input was changed in place")
            _require(torch.equal(y, expected), f"a {name} input in {dtype} gives other values")
            _require(name == "strided" or y.stride() == x.stride(), f"memory format: {x.stride()} became {y.stride()}")


def edge_cases(case: _Case) -> None:
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
        _require(bool(torch.isfinite(y).all()), f"{name} gave a value that is not finite")
        _require(y.shape == x.shape, f"{name} changed shape from {tuple(x.shape)} to {tuple(y.shape)}")
        _require(name != "zeros" or not y.any(), "zeros did not give zeros")


def nonfinite(case: _Case) -> None:
    """NaN passes through quantize and is refused by encode and by observers; Inf saturates."""
    x = case.sample.clone()
    x.flatten()[0] = float("nan")
    y = case.observed(x)
    _require(torch.equal(y.isnan(), x.isnan()), "quantize did not pass NaN on, or made some")
    try:
        case.observed.encode(x)
    except NoCodesError:
        pass
    except NonFiniteError:
        pass
    else:
        _require(False, "encode took NaN")
    x = case.sample.clone()
    x.flatten()[0], x.flatten()[-1] = float("inf"), float("-inf")
    y = case.observed(x)
    _require(bool(torch.isfinite(y).all()), "Inf did not saturate")
    for real, quantized in zip(case.slices(x), case.slices(y), strict=True):
        for sign in (1.0, -1.0) if real.numel() else ():
            ends = (sign * quantized)[real == sign * torch.inf]
            _require(bool((ends >= (sign * quantized).max()).all()), f"{sign * torch.inf} did not go to the last level")
    if not case.fresh.is_ready:
        for bad in (float("nan"), float("inf")):
            x.flatten()[0] = bad
            quantizer = copy.deepcopy(case.fresh)
            try:
                quantizer.pre_observe(x)
                refused = False
            except NonFiniteError:
                refused = True
            _require(refused or getattr(quantizer, "nonfinite", "") == "ignore", f"pre_observe took {bad}")


def per_channel(case: _Case) -> None:
    """A slice alone gives the same numbers as the same slice among others."""
    if case.axis is None:
        raise _Skip("it works per tensor")
    together = case.observed(case.sample)
    for i in range(case.sample.shape[case.axis]):
        alone = copy.deepcopy(case.fresh)
        part = case.sample.narrow(case.axis, i, 1)
        alone.pre_observe(part)
        _require(torch.equal(alone(part), together.narrow(case.axis, i, 1)), f"slice {i} alone differs")


def memoryless(case: _Case) -> None:
    """What says it `is_memoryless` is not changed by the tensor it has just seen."""
    if not case.observed.is_memoryless:
        raise _Skip("it averages over what it sees")
    again = copy.deepcopy(case.observed)
    again.pre_observe(case.sample)
    _require(_same(again(case.sample), case.observed(case.sample)), "the same tensor seen twice changes the output")


def neighbours(case: _Case) -> None:
    """`neighbours(x)` are levels, x is between them unless clipped, no level is, and `quantize(x)` is one of them."""
    x = case.wide()
    try:
        below, above = case.observed.neighbours(x)
    except NoCodesError as why:
        raise _Skip(str(why)) from None
    y = case.observed(x)
    _require(bool(((y == below) | (y == above)).all()), "quantize(x) is neither of its neighbours")
    inside = below < above
    _require(bool(((below <= x) & (x <= above))[inside].all()), "x does not lie between its neighbours")
    if case.observed.levels_vary:
        return
    _require(torch.equal(case.observed(below), below), "the level below is not its own quantized value")
    _require(torch.equal(case.observed(above), above), "the level above is not its own quantized value")
    levels = case.observed.levels()
    channels = levels if case.axis is not None else [levels]
    for low, high, known in zip(case.slices(below), case.slices(above), channels, strict=True):
        distinct = known.unique()
        next_up = distinct[torch.searchsorted(distinct, low.contiguous(), right=True).clamp_max(len(distinct) - 1)]
        _require(bool((high <= torch.maximum(next_up, low)).all()), "there is a level between the neighbours of x")


def settable(case: _Case) -> None:
    """`set_numbers(**numbers())` changes nothing, also of a quantizer that has seen something else."""
    numbers = case.observed.numbers()
    if not numbers:
        return
    other = copy.deepcopy(case.fresh)
    other.pre_observe(case.sample * 3.7)
    other.set_numbers(**numbers)
    _require(_same(other(case.sample), case.observed(case.sample)), "other output with the same numbers")


def gradient(case: _Case) -> None:
    """A finite gradient reaches x and every learned parameter."""
    quantizer = copy.deepcopy(case.observed)
    x = case.sample.clone().requires_grad_()
    y = quantizer(x)
    _require(y.requires_grad, "the output does not require grad although x does")
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    _require(x.grad is not None and bool(torch.isfinite(x.grad).all()), "the gradient of x is missing or not finite")
    reached = float((x.grad != 0).float().mean()) if x.grad is not None else 0.0
    _require(reached > 0.5, f"only {reached:.0%} of in-range elements got a gradient")
    for name, parameter in quantizer.named_parameters():
        found = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
        _require(found, f"parameter {name} got no finite gradient")


def gradient_size(case: _Case) -> None:
    """On the whole the gradient of x is the slope of the staircase, neither twice nor minus that."""
    quantizer = copy.deepcopy(case.observed)
    x, middle = case.sample, torch.zeros_like(case.sample)
    if quantizer.is_idempotent:
        reach = torch.full_like(x, 40.0 * float(x.abs().max()))
        low, high = (quantizer(end).detach() for end in (-reach, reach))
        middle = (low + high) / 2
        x = low + (high - low) * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    x = x.detach().clone().requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    _require(x.grad is not None, "x got no gradient")
    assert x.grad is not None
    around = (x - middle).detach()
    slope = float(((y.detach() - middle) * around).sum() / around.square().sum())
    ratio = float(x.grad.mean()) / slope
    # One step rises by 1.5 of what straight-through says, more of them come close to it.
    _require(0.5 < ratio < 1.8, f"the gradient of x is {ratio:.2f} of the slope of its quantized value")


def survives(case: _Case) -> None:
    """state_dict (strict, weights only), deepcopy, pickle, `.double().float()` and `.half()` keep the output."""
    x, expected = case.sample, case.observed(case.sample)
    file = io.BytesIO()
    torch.save(case.observed.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(case.fresh)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    _require(_same(loaded(x), expected), "a state_dict loaded into a fresh quantizer changes the output")
    _require(_same(copy.deepcopy(case.observed)(x), expected), "deepcopy changes the output")
    _require(_same(pickle.loads(pickle.dumps(case.observed))(x), expected), "pickle changes the output")
    for name, move in {"double().float()": lambda q: q.double().float(), "half()": lambda q: q.half()}.items():
        _require(_same(move(copy.deepcopy(case.observed))(x), expected), f".{name} changes the output")


class _ObserveAndQuantize(nn.Module):
    def __init__(self, quantizer: Quantizer, observe: bool) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.observe = observe

    def forward(self, x: Tensor) -> Tensor:
        if self.observe:
            self.quantizer.pre_observe(x)
        y = self.quantizer(x)
        self.quantizer.post_observe(y)
        return y


def compiles(case: _Case) -> None:
    """`torch.compile(fullgraph=True)` and `torch.export` give what eager gives."""
    for observe in (False, True):
        expected = _ObserveAndQuantize(copy.deepcopy(case.observed), observe)(case.sample)
        module = _ObserveAndQuantize(copy.deepcopy(case.observed), observe)
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(case.sample)
        _require(torch.equal(compiled, expected), f"the compiled result differs (observe={observe})")
        module = _ObserveAndQuantize(copy.deepcopy(case.observed), observe)
        exported = torch.export.export(module, (case.sample,)).module()(case.sample)
        _require(torch.equal(exported, expected), f"the exported result differs (observe={observe})")


LAWS: dict[str, Callable[[_Case], None]] = {
    law.__name__: law
    for law in (
        on_grid,
        levels_used,
        idempotent,
        monotone,
        keeps_form,
        edge_cases,
        nonfinite,
        per_channel,
        memoryless,
        neighbours,
        settable,
        gradient,
        gradient_size,
        survives,
        compiles,
    )
}


@checked
def check_quantizer(
    quantizer: Quantizer, sample: Tensor | None = None, laws: tuple[str, ...] | None = None
) -> LawReport:
    """Run the laws (`LAWS`) on a quantizer, ours or yours; nothing happens to the one you pass.

    `sample`: float tensor the quantizer is shown first, default N(0, 1) of shape (4, 6, 5, 5); pass one
    if yours takes only some data, e.g. not below 0. `laws`: names out of `LAWS`, default all.
    Raises ConfigError; LawViolation that names every law that fails and what was seen.

    >>> from torchquant import AffineQuantizer, BatchMinMax
    >>> report = check_quantizer(AffineQuantizer(4, BatchMinMax()), laws=("on_grid", "monotone"))
    >>> report.passed
    ('on_grid', 'monotone')
    """
    passed, skipped, broken = [], {}, {}
    unknown = [name for name in laws or () if name not in LAWS]
    if unknown:
        raise UnknownNameError(
            f"no law is called {shown(unknown[0])};{did_you_mean(unknown[0], LAWS)} Known: {', '.join(LAWS)}"
        )
    if sample is not None and not (sample.is_floating_point() and sample.numel()):
        raise ConfigError(f"the sample must be a tensor of real numbers with one at least, got {shown(sample)}")
    for name in LAWS if laws is None else laws:
        try:
            LAWS[name](_Case(quantizer, sample))
        except _Skip as why:
            skipped[name] = str(why)
        except Exception as error:  # a law that crashes is a law that fails
            broken[name] = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
        else:
            passed.append(name)
    if broken:
        raise LawViolation(", ".join(broken), "; ".join(f"[{n}] {d}" for n, d in broken.items()))
    return LawReport(tuple(passed), skipped)
