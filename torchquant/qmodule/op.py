"""QOp: an operator that returns a tensor, such as an addition, and can quantize its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.qmodule.state import QModule, QModuleState
from torchquant.quantizers import Quantizer


@checked
class QOp(QModule):
    """Runs `op(*args)`, then an optional activation; quantizes the result.

    `op`: a function or module that returns one tensor. `acts_quantizer` may be None (float). `input_quantizer`
    quantizes the first argument. `is_split` and `fused`, as in QWrapper, are for models that run the activation
    themselves.

    >>> import operator, torch
    >>> from torchquant.quantizers import AffineQuantizer
    >>> from torchquant.range_observers import ExpAvgMinMax
    >>> add = QOp(operator.add, AffineQuantizer(8, ExpAvgMinMax()))
    >>> add(torch.ones(2), torch.ones(2))
    tensor([2., 2.])
    """

    held_as: ClassVar[str] = "op"

    def __init__(
        self,
        op: Callable[..., Tensor],
        acts_quantizer: Quantizer | None = None,
        activation: nn.Module | None = None,
        input_quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        self.op = op
        self.acts_quantizer = acts_quantizer
        self.activation = activation
        self.input_quantizer = input_quantizer
        self._hold()

    def forward(self, *args: Any, fused: bool = False, **kwargs: Any) -> Tensor:
        if self.is_split and self.state is QModuleState.BYPASSED and not fused:
            return self.op(*args, **kwargs)
        if self.input_quantizer is not None and args:
            args = (self._run_acts_quantizer("input", self.input_quantizer, args[0]), *args[1:])
        y = self.compute(*args, **kwargs)
        return self._run_acts_quantizer("output", self.acts_quantizer, y, self.activation)

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the operator itself."""
        return self.op(*args, **kwargs)

    def extra_repr(self) -> str:
        op = "" if isinstance(self.op, nn.Module) else f"{getattr(self.op, '__name__', self.op)}, "
        return f"{op}state={self.state.name}{self.held_repr()}"
