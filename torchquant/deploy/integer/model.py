"""The integer reference: what a runtime with integer arithmetic computes, number for number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchquant._arguments import checked
from torchquant.deploy.integer.context import Follow, IntegerRun, integer_run
from torchquant.deploy.integer.tensor import IntegerTensor
from torchquant.deploy.lowering.lowered import Lowered, lowered_as
from torchquant.quantizers_functional.requantize import check_rounding


class IntegerModel(nn.Module):
    """A quantized model on integer codes: real tensors in, real tensors out, integers between. See `to_integer`.

    `float_operators`: what ran on real numbers with the example. `accumulators`: site -> the largest sum of products
    its weight and the range of its input allow. `not_run`: paths of QModules that the example did not run; they run
    later only to raise ExportError.
    """

    def __init__(self, lowered: Lowered, rounding: str) -> None:
        super().__init__()
        self.form = lowered.form
        self.rounding = rounding
        self.tables = not lowered.as_exported
        self.float_operators = lowered.float_operators
        self.accumulators = lowered.accumulators
        self.not_run = lowered.not_run

    def train(self, mode: bool = True) -> IntegerModel:
        """Stays in evaluation mode: integers are not trained."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)

    def codes(self, *args: Any, **kwargs: Any) -> dict[str, list[Tensor]]:
        """Site -> the integer codes (int64) of each call there, for these inputs."""
        recorded: dict[str, list[Tensor]] = {}
        self.run(args, kwargs, recorded)
        return recorded

    @torch.no_grad()
    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        recorded: dict[str, list[Tensor]] | None = None,
        follow: Follow | None = None,
    ) -> Any:
        """The outputs; codes are put into `recorded` and shown to `follow`, if given."""
        with integer_run(IntegerRun(self.rounding, tables=self.tables, recorded=recorded, follow=follow)):
            return tree_map_only(IntegerTensor, IntegerTensor.real, self.form(*args, **kwargs))


@checked
def to_integer(
    model: nn.Module | Lowered,
    example_inputs: Any = None,
    rounding: str = "ort",
    keep_signed: bool = False,
    as_exported: bool = False,
) -> IntegerModel:
    """The calibrated model, or what `lower` made of it, as it runs on integers, on the CPU. The model is not changed.

    Sites with a quantizer exchange codes; convolutions (also transposed), linear layers and matrix products take
    32-bit sums of products of codes, biases in steps of input scale times weight scale, batch norms folded; additions,
    products, concatenations and pools are rescaled; ReLU and ReLU6 are bounds of the codes. Weights of ESB, powers of
    two, APoT, ternary, binary and residual schemes take part as whole numbers (`Quantizer.integer_terms`). What has no
    such form (softmax, GELU, norms, activations other than clamps, anything around a site without quantizer) runs
    in float32 and is listed in `float_operators`.

    `rounding`: how sums return to codes, one of the four of `quantizers_functional/requantize.py`; "ort" reproduces
    the integer kernels of ONNX Runtime on x86-64. `example_inputs`: what the model takes, as in `export_onnx`.
    `keep_signed` as in `export_onnx`: otherwise codes of activations count from 0 on. `as_exported`: weights that an
    ONNX file holds as tables of levels count as real numbers, as they do there.

    Raises ExportError for an uncalibrated site that runs, one without integer codes, an accumulator or bias that can
    leave 32 bits; ConfigError.

    >>> from torchquant import QModuleState, qmodule_state, quantize
    >>> x = torch.randn(8, 4)
    >>> model = quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "int8-ort", x)
    >>> with qmodule_state(model, QModuleState.CALIBRATION):
    ...     _ = model(x)
    >>> integer = to_integer(model, x)
    >>> integer(x).shape, integer.float_operators
    (torch.Size([8, 2]), ())
    >>> sorted(integer.codes(x))
    ['0.output', '2.output', 'quantize_input_1.output']
    """
    check_rounding(rounding)
    return IntegerModel(lowered_as(model, example_inputs, keep_signed, as_exported or None), rounding)
