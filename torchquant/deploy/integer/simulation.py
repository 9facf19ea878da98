"""Run the quantized model itself with the arithmetic of the runtime."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchquant._arguments import checked
from torchquant.deploy.integer.context import IntegerRun, integer_run
from torchquant.deploy.integer.tensor import IntegerTensor, quantized
from torchquant.deploy.integer.values import Codes
from torchquant.deploy.lowering.deploy_form import DeployLayer, DeployOp, deploy_form, fix_bias_scales, form_of
from torchquant.deploy.lowering.qdq import grid_site
from torchquant.qmodule import QModule
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.requantize import check_rounding


class _Instead(torch.autograd.Function):
    """Returns `exact` in forward and passes the gradient to `simulated`."""

    @staticmethod
    def forward(ctx: Any, simulated: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@checked
@contextmanager
def runtime_exact(model: nn.Module, example_inputs: Any, rounding: str = "ort") -> Iterator[nn.Module]:
    """Let QModules that quantize compute the numbers of the runtime, with their usual gradients, within the context.

    Each QModule converts its inputs back to codes, multiplies and adds integers, adds the bias in steps of input scale
    times weight scale, and rounds to output codes as `rounding` says: the codes of all sites equal those of
    `to_integer(model, example_inputs, rounding)`. Use it on the CPU, to evaluate and to fine-tune with the deployed
    arithmetic; batch norms use their running statistics. Calibration and BYPASSED are not affected.

    `example_inputs`: run once, to find the quantizer that each input comes from. The model must be calibrated, as for
    `to_integer`. A step takes about three times as long as a plain one. Raises ExportError, ConfigError.

    >>> from torchquant import QModuleState, qmodule_state, quantize, set_qmodule_state
    >>> from torchquant.deploy import to_integer
    >>> x = torch.randn(8, 4)
    >>> model = quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "int8-ort", x).eval()
    >>> with qmodule_state(model, QModuleState.CALIBRATION):
    ...     _ = model(x)
    >>> set_qmodule_state(model, QModuleState.QUANT_EVAL)
    >>> with runtime_exact(model, x):
    ...     y = model(x)
    >>> torch.equal(y, to_integer(model, x)(x))
    True
    """
    check_rounding(rounding)
    sources = _sources(model, example_inputs)
    quantizers = _quantizers(model)
    calls: Counter[str] = Counter()
    handles = [model.register_forward_pre_hook(_StartAnew(calls))]
    for path, module in _sites(model):
        if path in sources:
            hook = _Exactly(path, sources[path], quantizers, calls, rounding)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _sites(model: nn.Module) -> Iterator[tuple[str, QModule]]:
    for name, module in model.named_modules():
        if isinstance(module, QModule) and form_of(module) in (DeployLayer, DeployOp):
            yield name or type(module).__name__, module


def _quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return site -> its quantizer, for activations."""
    modules = ((name or type(m).__name__, m) for name, m in model.named_modules() if isinstance(m, QModule))
    return {f"{path}.{kind}": q for path, module in modules for kind, q in module.quantizers().items()}


def _sources(model: nn.Module, example_inputs: Any) -> dict[str, list[list[str | None]]]:
    """Find path -> for each call, the sites that its arguments come from; None for real numbers."""
    form = deploy_form(model)
    found: dict[str, list[list[str | None]]] = {}

    def note(module: Any, args: tuple[Any, ...]) -> None:
        found.setdefault(module.path, []).append([_source(a) for a in _flat(args)])

    for module in form.modules():
        if isinstance(module, DeployLayer | DeployOp) and not any(
            isinstance(inner, DeployLayer | DeployOp) for inner in module.modules() if inner is not module
        ):
            module.register_forward_pre_hook(note)
    fix_bias_scales(form, example_inputs)
    return found


def _source(x: Any) -> str | None:
    return x.value.site if isinstance(x, IntegerTensor) and isinstance(x.value, Codes) else None


def _flat(args: tuple[Any, ...]) -> list[Any]:
    """Flatten arguments, including those in lists."""
    return [a for arg in args for a in (arg if isinstance(arg, tuple | list) else [arg])]


class _StartAnew:
    """Forward hook of the model that resets the counts of calls at the begin of a pass."""

    is_simulation = True

    def __init__(self, calls: Counter[str]) -> None:
        self.calls = calls

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.calls.clear()


class _Exactly:
    """Forward hook that replaces the output of a QModule by its integer result."""

    is_simulation = True
    """Tells that a lowered model computes the same without this hook."""

    def __init__(
        self,
        path: str,
        sources: list[list[str | None]],
        quantizers: dict[str, Quantizer],
        calls: Counter[str],
        rounding: str,
    ) -> None:
        self.path, self.sources, self.quantizers = path, sources, quantizers
        self.calls, self.rounding = calls, rounding

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or not module.state.is_act_quantized:
            return None
        kind: Any = form_of(module)
        if kind is DeployLayer and not module.state.is_weight_quantized:
            return None
        sources = self.sources[self.calls[self.path] % len(self.sources)]
        self.calls[self.path] += 1
        with torch.no_grad(), integer_run(IntegerRun(self.rounding)):
            form = kind(module, self.path)
            own = {name: part for name, part in form.named_children() if name in ("bn", "activation", "op", "layer")}
            for name, part in own.items():  # the model's own: neither their mode nor their statistics may change
                setattr(form, name, copy.deepcopy(part).eval())
            left = iter(sources)
            integers = tuple(
                type(a)(self._integers(part, next(left)) for part in a)
                if isinstance(a, tuple | list)
                else self._integers(a, next(left))
                for a in args
            )
            exact = tree_map_only(IntegerTensor, IntegerTensor.real, form(*integers, **kwargs))
        return _Instead.apply(output, exact.to(output.dtype))  # type: ignore[no-any-return]

    def _integers(self, x: Any, source: str | None) -> Any:
        """Convert real numbers on the grid of their source to its integers."""
        if source is None or not isinstance(x, Tensor):
            return x
        site = grid_site(self.quantizers[source], source)
        return quantized(IntegerRun(self.rounding), source, site, x.detach())
