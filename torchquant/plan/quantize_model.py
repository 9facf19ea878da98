"""Quantize any model in one call."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchquant._arguments import checked
from torchquant.errors import ConfigError, StaysFloatWarning
from torchquant.graph.called import tensors_in
from torchquant.graph.copies import copy_model
from torchquant.graph.finder import capture
from torchquant.graph.recording import call_with_copies, undisturbed
from torchquant.graph.sites import Unquantized
from torchquant.graph.traced import graphs_running
from torchquant.plan.adapters import tell_adapters
from torchquant.plan.quant_plan import QuantPlan
from torchquant.plan.rules import Rules
from torchquant.qmodule.lean import set_lean

OTHER_RESULT = "its torch.fx graph computed something else on the example, so layers are wrapped one by one"


@checked
def quantize(
    model: nn.Module,
    rules: Rules | QuantPlan,
    example_inputs: Any = None,
    inplace: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Copy a float model and put quantizers where the rules say, ready to calibrate.

    `rules`: the name of a rule set ("w8a8", "w4a8", "w4a8-minmax", "w4a4-lsq", "w2a2-lsq", "ternary", "w8a8-products",
    "w8a8-transformer", "w4a8-transformer", "int8-ort", "int8-openvino", "int8-tensorrt"), a list of rules, or a
    QuantPlan; see `QuantPlan.from_rules`. `example_inputs`: a tensor, a tuple or a dictionary of arguments; with it
    forwards are traced as they are called, and the graphs are compared with the float model in evaluation and in
    training; where they compute something else, layers are wrapped one by one instead. The plan is `model.plan`. The
    given model is not changed or run, unless `inplace`.

    The result trains lean, see `set_lean`: it keeps codes for backward in place of floats, with the same gradients.
    In QModuleState.BYPASSED the result runs the forwards of the float model. `model.plan.coverage` gives the quantized
    share of the weights and of the multiply-adds. Warns if more than 5 % of either stays float although no rule of
    yours leaves it float, or if nothing was found to quantize; `strict=True` raises ConfigError instead, and leaves the
    given model unchanged. Raises ConfigError.

    >>> from torchquant import QModuleState, qmodule_state, set_qmodule_state
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> x = torch.randn(2, 1, 8, 8)
    >>> model = quantize(net.eval(), "w8a8", x)
    >>> bool((model(x) == net(x)).all())
    True
    >>> with qmodule_state(model, QModuleState.CALIBRATION):
    ...     y = model(x)
    >>> set_qmodule_state(model, QModuleState.QUANT_EVAL)
    """
    if isinstance(rules, QuantPlan):
        plan = rules
        quantized = plan.apply(model, inplace)
    else:
        plan, quantized = _planned(model, rules, example_inputs, inplace, trace=True)
        if example_inputs is not None and not _same(model if not inplace else None, quantized, example_inputs):
            float_model = plan.revert(quantized, inplace=True) if inplace else model
            plan, quantized = _planned(float_model, rules, example_inputs, inplace, trace=False)
            plan = replace(plan, floats=(Unquantized("", type(model).__name__, OTHER_RESULT), *plan.floats))
    if told := _left_float(plan, type(model).__name__):
        if strict:
            if inplace:
                plan.revert(quantized, inplace=True)
            raise ConfigError(told)
        warnings.warn(told, StaysFloatWarning, stacklevel=3)  # the caller of the wrapper that `checked` made
    quantized.plan = plan  # type: ignore[assignment]
    set_lean(quantized, not isinstance(quantized, nn.TransformerEncoderLayer))  # hooks switch off its fused path
    if example_inputs is not None:
        made: Any = quantized.conversion
        made.example = tree_map_only(Tensor, lambda x: x.detach().to("meta"), example_inputs)
    tell_adapters(quantized)
    return quantized


def _left_float(plan: QuantPlan, name: str) -> str:
    """Describe the parts that should not have stayed float, and what to do; "" if there are none."""
    if not plan.sites:
        return f"quantize found nothing to quantize in {name}: it stays float; print(model.plan) says why"
    lacks = "" if plan.coverage is None else plan.coverage.lacks()
    if not lacks:
        return ""
    return (
        f"quantize leaves part of {name} float, {lacks}. Give these sites a rule, or a rule with skip: True if they "
        "should stay float; parts that are no site can be rewritten with layers of torch.nn. "
        "print(model.plan.coverage) lists all parts; to silence this warning, filter StaysFloatWarning"
    )


def _planned(
    model: nn.Module, rules: Rules, example_inputs: Any, inplace: bool, trace: bool
) -> tuple[QuantPlan, nn.Module]:
    """Make the plan and apply it; the model is captured once."""
    target = model if inplace else copy_model(model)
    captured = capture(target, example_inputs, trace=trace, fuse=trace)
    plan = QuantPlan.from_rules(rules, captured, example_inputs)
    return plan, plan.apply_to(captured)


@torch.no_grad()
def _same(model: nn.Module | None, quantized: nn.Module, example_inputs: Any) -> bool:
    """Tell whether the graphs compute the same as the forwards on the example, in both modes, bit for bit.

    `model`: the float model, None if it was quantized itself: then the forwards of the result are run.
    """
    float_model, twin = copy_model(quantized if model is None else model), copy_model(quantized)
    for training in (False, True):
        expected = _outcome(float_model, example_inputs, training)
        if isinstance(expected, Exception):  # the float model itself fails in this mode
            continue
        with graphs_running():
            found = _outcome(twin, example_inputs, training)
        if isinstance(found, Exception) or len(found) != len(expected) or not all(map(_equal, expected, found)):
            return False
    return True


def _outcome(twin: nn.Module, example_inputs: Any, training: bool) -> list[Tensor] | Exception:
    """Run a throw-away copy on the example; return its output tensors, or its error."""
    with undisturbed(twin, training):
        torch.manual_seed(0)
        try:
            return list(tensors_in(call_with_copies(twin, example_inputs)))
        except Exception as error:  # a forward may raise anything
            return error


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)
