"""The base of AutoQNN's shipped classes: their arguments, read as those of a scheme of torchquant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from torchquant.compat.autoqnn.quantizers.diff_tricks import GRADIENT_NAMES, get_diff_func
from torchquant.quantizers._spec import construct_as


class Scheme:
    """A scheme of torchquant under AutoQNN's name, for weights. Defects of the published code are not reproduced.

    `bitwidth`: None is the width of the published class without arguments. `per_channel`: numbers for each slice along
    `channel_axis`, by default axis 0 of a weight and axis 1 of an activation; `channel_size` follows from the tensor.
    `momentum`: of the average of the statistics over batches; None: a weight is measured anew each time, an activation
    averages with 0.9.
    """

    spec: ClassVar[str]
    """The spec string of the scheme; `{n}` stands for its width."""
    slot: ClassVar[str] = "weight"
    average: ClassVar[str] = ""
    """The part of a spec string that makes the scheme average, if it does not by itself."""
    axis_of_channels: ClassVar[int] = 0
    published_bits: ClassVar[int] = 8
    fixed_bits: ClassVar[int | None] = None
    """The width of a scheme that has only one."""
    widest: ClassVar[int | None] = None
    """The width above which AutoQNN takes `published_bits`."""

    def __init__(
        self,
        bitwidth: int | None = None,
        gradient_ratio: float = 0.0,
        freeze_bitwidth: bool = True,
        target_bitwidth: float = 4,
        max_bitwidth: int = 8,
        backward_type: str = "ste",
        per_channel: bool = False,
        channel_axis: int | None = None,
        channel_size: int = 1,
        momentum: float | None = None,
    ) -> None:
        get_diff_func(backward_type)
        n_bits = self._allowed(self.published_bits if bitwidth is None else bitwidth)
        axis = self.axis_of_channels if channel_axis is None else channel_axis
        spec = self._spec(n_bits, momentum) + ("/channel" if per_channel else "")
        quantizer: Any = self
        construct_as(quantizer, spec, self.slot, axis if per_channel else None)
        given = (n_bits, gradient_ratio, freeze_bitwidth, target_bitwidth, max_bitwidth, backward_type)
        quantizer.set_arguments(*given, per_channel, axis, channel_size)
        if GRADIENT_NAMES[backward_type] != "ste":
            quantizer.set_gradient(GRADIENT_NAMES[backward_type], rho=gradient_ratio)

    def _spec(self, n_bits: int, momentum: float | None) -> str:
        return self.spec.format(n=n_bits) + ("" if momentum is None else f"{self.average},momentum={momentum}")

    def _allowed(self, n_bits: int) -> int:
        """Return the width that the scheme has for a given one; warn if it is another."""
        kept = n_bits if self.widest is None or n_bits <= self.widest else self.published_bits
        kept = kept if self.fixed_bits is None else self.fixed_bits
        if kept != n_bits:
            name = type(self).__name__
            warnings.warn(f"{name} has {kept} bits, as in AutoQNN; bitwidth={n_bits} has no effect", stacklevel=4)
        return kept

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        quantizer: Any = self
        return quantizer.quantize(*args, **kwargs)  # type: ignore[no-any-return]


class OwnSteps(Scheme):
    """A mid-rise scheme whose steps can be given. `lambdas`: a step for each width, in units of the deviation."""

    lambdas: list[float] | None

    def __init__(self, bitwidth: int | None = None, lambdas: Sequence[float] | None = None, **kwargs: Any) -> None:
        self.__dict__["lambdas"] = None if lambdas is None else [float(step) for step in lambdas]
        super().__init__(bitwidth, **kwargs)

    def best_step(self, rms: Tensor) -> Tensor:
        """Return the step: of `lambdas`, else of least error on a Gaussian."""
        quantizer: Any = self
        if self.lambdas is not None:
            return self.lambdas[quantizer.n_bits - 1] * rms
        return super().best_step(rms)  # type: ignore[misc]


class Activation(Scheme):
    """A scheme for activations, which averages its statistics and quantizes equally in training and evaluation."""

    slot = "output"
    axis_of_channels = 1
