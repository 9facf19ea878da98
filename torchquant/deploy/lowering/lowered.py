"""From a calibrated model to what a file holds of it, made once and handed to all that work with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant._arguments import checked
from torchquant.deploy.lowering.deploy_form import deploy_form, fix_bias_scales
from torchquant.errors import ConfigError


@dataclass(frozen=True)
class FloatOperator:
    """An operator on real numbers, between an explicit dequantize and quantize; `after`: the site reached before it."""

    name: str
    after: str


@dataclass(frozen=True)
class Lowered:
    """A calibrated model with its weights as codes and its biases in steps of the sums they are added to; see `lower`.

    `model`: the model it was made from, which must stay as it was. `form`: the module that computes it (`deploy_form`).
    `float_operators`: what runs on real numbers. `accumulators`: site -> the largest sum of products its weight and the
    range of its input allow. `not_run`: paths of QModules that the example did not run.
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

    `example_inputs`, `keep_signed`: as in `export_onnx`. `as_exported`: weights that an ONNX file holds as tables of
    levels count as real numbers, as they do there; False lets them take part in integers. The model is not changed.
    Raises ExportError for an uncalibrated site that runs, one without codes, an accumulator or bias that can leave 32
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
    """The model lowered, or what it is already. `as_exported`: None takes either, and lowers with False.

    Raises ConfigError if that was lowered otherwise than is asked for, or a model comes without example.
    """
    if not isinstance(model, Lowered):
        if example_inputs is None:
            raise ConfigError("a model needs example_inputs to be lowered: a tensor or a tuple of what it takes")
        return lower(model, example_inputs, keep_signed, bool(as_exported))
    if example_inputs is not None:
        raise ConfigError("a Lowered has its example already; leave example_inputs out, or give the model itself")
    if keep_signed and not model.keep_signed:
        raise ConfigError("keep_signed=True, but the model was lowered without; use lower(..., keep_signed=True)")
    if as_exported and not model.as_exported:
        raise ConfigError("the model was lowered with as_exported=False, which no file computes; use lower(...)")
    return model
