"""The forward that is being recorded: who wants to know which tensor was quantized from what.

Lean training (qmodule/lean.py) keeps codes for backward, and formats tell it here what they made.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchquant.quantizers_functional._gradient import Clamp, Gradient
    from torchquant.quantizers_functional.formats import Format


class Recorder(Protocol):
    """One recorded forward."""

    def note_quantized(self, value: Tensor, format: Format, x: Tensor, clamp: Clamp | None = None) -> None:
        """Note that `value` is the projection of x, or of `x.clamp(*clamp)`, on the format."""

    def gradient_of(self, gradient: Gradient, format: Format, x: Tensor, clamp: Clamp | None) -> Gradient:
        """Return the estimator to use in place of `gradient`, with the same gradients."""

    def may_change(self, gradient: Gradient, x: Tensor, clamp: Clamp | None) -> bool:
        """Whether `gradient_of` may return another estimator for x."""

    def note_computed(self, value: Tensor, compute: Callable[..., Tensor], *inputs: Tensor | None) -> None:
        """Note that `value` is `compute(*inputs)`, which computes the same every time."""

    def note_input(self, x: Tensor) -> None:
        """Note the input of a layer, which may hold levels that were noted as another tensor."""

    def note_zeros_and(self, x: Tensor, result: Tensor) -> None:
        """Note a result that holds elements of x, and zeros."""

    def misses(self, x: Tensor) -> bool:
        """Whether nothing was noted about a tensor that is large enough to be worth it."""

    def knows(self, x: Tensor) -> bool:
        """Whether something was noted about x, or about the tensor of which it is a view, and still holds."""


class _OfThread(threading.local):
    recorder: Recorder | None = None


_OF_THREAD = _OfThread()


def current_recorder() -> Recorder | None:
    """Return the recorder of this thread's forward, None if there is none; compiled code is not recorded."""
    return None if torch.compiler.is_compiling() else _OF_THREAD.recorder


def set_recorder(recorder: Recorder | None) -> None:
    """Set the recorder of this thread's forward."""
    _OF_THREAD.recorder = recorder
