"""Any model in one call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchquant._arguments import checked
from torchquant.graph.sites import LeftFloat
from torchquant.graph.trace import in_mode
from torchquant.graph.watch import call_with, tensors_in
from torchquant.plan.quant_plan import QuantPlan
from torchquant.plan.rules import Rules


@checked
def quantize(
    model: nn.Module, rules: Rules | QuantPlan, example_inputs: Any = None, inplace: bool = False
) -> nn.Module:
    """A copy of a float model with quantizers where the rules say, ready to calibrate.

    `rules`: a ready set by name ("w8a8", "w4a8", "w4a4-lsq", "w2a2-lsq", "ternary", "int8-ort",
    "int8-openvino"), a list of rules, or a QuantPlan; see `QuantPlan.from_rules`. `example_inputs`: a tensor, a
    tuple or a dictionary of arguments; with it the result is checked to compute what the float model does, and
    where a traced forward does not, layers are wrapped one by one instead. The plan is `model.plan`.

    Raises ConfigError.

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
        plan = QuantPlan.from_rules(rules, model, example_inputs)
        quantized = plan.apply(model, inplace=False)
        if example_inputs is not None and plan.trace and not _same(model, quantized, example_inputs):
            why = "as followed by torch.fx it computed something else on the example, so layers are wrapped one by one"
            plan = QuantPlan.from_rules(rules, model, example_inputs, trace=False, fuse=False)
            plan = replace(plan, floats=(LeftFloat("", type(model).__name__, why), *plan.floats))
            quantized = plan.apply(model, inplace)
        elif inplace:
            quantized = plan.apply(model, inplace=True)
    quantized.plan = plan  # type: ignore[assignment]
    return quantized


@torch.no_grad()
def _same(model: nn.Module, quantized: nn.Module, example_inputs: Any) -> bool:
    """Whether both give the same on the example, in evaluation mode, bit for bit."""
    with in_mode(False, model, quantized):
        expected = list(tensors_in(call_with(model, example_inputs)))
        try:
            found = list(tensors_in(call_with(quantized, example_inputs)))
        except Exception:  # whatever goes wrong in a graph that follows the model wrongly
            return False
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(expected, found, strict=True)
    )
