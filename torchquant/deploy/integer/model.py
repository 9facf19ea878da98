"""Make the integer reference: it computes exactly what a runtime with integer arithmetic computes."""

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
    """A quantized model that computes on integer codes between real inputs and real outputs. See `to_integer`.

    `float_operators`: operators that ran in float32 on the example. `accumulators`: site -> the largest sum of products
    that its weight and the range of its input allow. `not_run`: paths of QModules that the example did not run; they
    raise ExportError if they run later.
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
        """Do nothing: an integer model stays in evaluation mode, since integers are not trained."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)

    def codes(self, *args: Any, **kwargs: Any) -> dict[str, list[Tensor]]:
        """Compute site -> the integer codes (int64) of each of its calls, for these inputs."""
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
        """Return the outputs; put codes into `recorded` and pass them to `follow`, if given."""
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
    """Make the integer reference of a calibrated model, or of its `lower` result, on the CPU. The model is not changed.

    Sites with a quantizer exchange codes; convolutions (also transposed), linear layers and matrix products take 32-bit
    sums of products of codes, biases in steps of input scale times weight scale, batch norms folded; additions,
    products, concatenations and pools are rescaled; ReLU and ReLU6 are bounds of the codes. Weights of ESB, powers of
    two, APoT, ternary, binary and residual schemes are integers too (`Quantizer.integer_terms`). Operators without such
    a form (softmax, GELU, norms, activations other than clamps, operators at a site without quantizer) run in float32
    and are listed in `float_operators`.

    `rounding`: how sums are requantized, one of the four modes of `quantizers_functional/requantize.py`; "ort"
    reproduces the integer kernels of ONNX Runtime on x86-64. `example_inputs`: inputs of the model, as in
    `export_onnx`. `keep_signed` as in `export_onnx`: otherwise codes of activations count from 0 on. `as_exported`:
    weights that an ONNX file stores as tables of levels are real numbers, as in the file.

    Raises ExportError for an uncalibrated site that runs, a site without integer codes, and an accumulator or bias that
    can exceed 32 bits; ConfigError.

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
