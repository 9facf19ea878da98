"""A call of torch as rules see it, and what they note about the channels that it reads.

`channel_rules.py` and `channel_scales.py` hold the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torchquant.ptq.paths import Run

POSITIVE = "positive"
"""Note: the factor must be positive."""
FIXED = "fixed"
"""Note: what is added to a channel before the operator is not added to its result."""
BOUNDED = "bounded"
"""Note: values end at a bound that a factor would move; `where` is the activation, or "" for a function."""

CENTRED = "centred"
"""Note: the mean over channels is taken off; a rotation must keep it."""


@dataclass(frozen=True)
class Call:
    """A call of torch in a run. `result`: what it returned, or the first of several tensors."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    def get(self, i: int, name: str, default: Any = None) -> Any:
        """Return an argument by its place or name."""
        return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)

    @property
    def x(self) -> Any:
        return self.get(0, "input")


Rule = Callable[["Run", Call], Any]
