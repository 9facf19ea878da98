"""What stands in a model where a batch norm or an activation was that a QWrapper has taken in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchquant.qmodule.op import QOp
from torchquant.qmodule.state import QModuleState
from torchquant.qmodule.wrapper import QWrapper


class FusedPart(nn.Module):
    """Runs the part in BYPASSED, where its wrapper runs the layer alone, and passes on what comes in elsewhere.

    So the forward of the float model computes what it always did, and nothing is computed twice where the wrapper
    computes all. Attributes are those of the part, which the wrapper holds.

    >>> norm = nn.BatchNorm1d(2)
    >>> wrapper = QWrapper([nn.Linear(3, 2), norm], None, None)
    >>> FusedPart(wrapper, norm).num_features
    2
    """

    def __init__(self, wrapper: QWrapper | QOp, part: nn.Module) -> None:
        super().__init__()
        self.__dict__["held"] = (wrapper, part)  # not registered: they are at the wrapper's path
        self.training = part.training

    def forward(self, x: Tensor) -> Tensor:
        wrapper, part = self.held
        return part(x) if wrapper.state is QModuleState.BYPASSED else x

    def train(self, mode: bool = True) -> FusedPart:
        wrapper, part = self.held
        self.training = mode
        is_frozen = isinstance(wrapper, QWrapper) and wrapper.bn_frozen and part is not wrapper.activation
        part.train(mode and not is_frozen)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "held" not in self.__dict__:
                raise
            return getattr(self.__dict__["held"][1], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Written to the part, if the part has it."""
        held = self.__dict__.get("held")
        if held is not None and name != "training" and not name.startswith("_") and hasattr(held[1], name):
            setattr(held[1], name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{type(self.held[1]).__name__}, taken in by a QWrapper"
