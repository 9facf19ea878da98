"""Lower a calibrated model to the contents of a file, once, for export, certificate and integer reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant._arguments import checked
from torchquant.deploy.lowering.deploy_form import deploy_form, fix_bias_scales
from torchquant.errors import ConfigError


@dataclass(frozen=True)
class FloatOperator:
    """An operator on real numbers, between an explicit dequantize and quantize; `after`: the last site before it."""

    name: str
    after: str


@dataclass(frozen=True)
class Lowered:
    """A calibrated model with its weights as codes and its biases in steps of the sums they are added to; see `lower`.

    `model`: the model it was made from, which must not change. `form`: the module that computes on codes
    (`deploy_form`). `float_operators`: operators that run on real numbers. `accumulators`: site -> the largest sum of
    products that its weight and the range of its input allow. `not_run`: paths of QModules that the example did not
    run.
    """

    model: nn.Module
    form: nn.Module
    example_inputs: Any
    keep_signed: bool
    as_exported: bool
    float_operators: tuple[FloatOperator, ...]
    accumulators: dict[str, float]
    not_run: tuple[str, ...]


@checked
def lower(model: nn.Module, example_inputs: Any, keep_signed: bool = False, as_exported: bool = True) -> Lowered:
    """Lower a calibrated model once; `export_onnx`, `to_integer` and `certify` take the result in place of the model.

    `example_inputs`, `keep_signed`: as in `export_onnx`. `as_exported`: weights that an ONNX file stores as tables of
    levels are real numbers, as in the file; False computes them in integers. The model is not changed. Raises
    ExportError for an uncalibrated site that runs, a site without codes, and an accumulator or bias that can exceed 32
    bits.

    >>> import torch
    >>> from torchquant import QModuleState, qmodule_state, quantize
    >>> from torchquant.deploy import to_integer
    >>> x = torch.randn(8, 4)
    >>> model = quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "int8-ort", x)
    >>> with qmodule_state(model, QModuleState.CALIBRATION):
    ...     _ = model(x)
    >>> lowered = lower(model, x)
    >>> to_integer(lowered)(x).shape, lowered.float_operators
    (torch.Size([8, 2]), ())
    """
    form = deploy_form(model, keep_signed)
    met = fix_bias_scales(form, example_inputs, tables=not as_exported)
    operators = tuple(FloatOperator(name, after) for name, after in met.floats)
    return Lowered(model, form, example_inputs, keep_signed, as_exported, operators, dict(met.largest), met.not_run)


def lowered_as(
    model: nn.Module | Lowered, example_inputs: Any, keep_signed: bool, as_exported: bool | None = None
) -> Lowered:
    """Lower a model, or return a `Lowered` unchanged. `as_exported`: None accepts both kinds, and lowers with False.

    Raises ConfigError if it was lowered with other settings than requested, and for a model without example.
    """
    if not isinstance(model, Lowered):
        if example_inputs is None:
            raise ConfigError("to lower a model, give example_inputs: a tensor, or a tuple of its inputs")
        return lower(model, example_inputs, keep_signed, bool(as_exported))
    if example_inputs is not None:
        raise ConfigError("a Lowered already has its example; leave example_inputs out, or give the model itself")
    if keep_signed and not model.keep_signed:
        raise ConfigError("keep_signed=True, but the model was lowered without; use lower(..., keep_signed=True)")
    if as_exported and not model.as_exported:
        raise ConfigError("the model was lowered with as_exported=False, which no file can hold; use as_exported=True")
    return model
