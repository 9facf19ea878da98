"""Ternary weight quantizer. Maths: quantizers_functional/ternary.py."""

from __future__ import annotations

from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.quantizers_functional.ternary import METHODS, Ternary, ternary_params
from torchquant.range_observers._distributed import gather_rows, ranks
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("ternary")
class TernaryQuantizer(ScaledQuantizer):
    """{-alpha, 0, alpha}: ternary weight networks (Li et al. 2016, arXiv:1605.04711; docs/algorithms.md A7).

    `method="twn"`: threshold 0.7 E|x|, alpha the mean above it. `"exact"`: the pair of least squared
    error. `axis` None or the channel axis; `momentum` as in `StatisticTracker`, 0 for weights.
    For "exact", ranks of torch.distributed gather their tensors. Codes take 2 bits. Raises ConfigError.

    >>> import torch
    >>> quantizer = TernaryQuantizer()
    >>> quantizer.pre_observe(torch.tensor([-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]))
    >>> quantizer(torch.tensor([-1.2, -0.5, -0.1, 0.2, 0.6, 1.4]))
    tensor([-0.9250, -0.9250,  0.0000,  0.0000,  0.9250,  0.9250])
    """

    about = About(
        formula="alpha * sign(x) where |x| > threshold, else 0; threshold = 0.7 E|x|, alpha = mean of |x| above it",
        paper="Li et al. 2016, arXiv:1605.04711",
        bits="2",
    )
    n_bits = 2
    presets = {"twn": {"method": "twn"}}
    statistics = ("threshold", "alpha")
    own_rule = ("method", "twn")
    code_range = Ternary.code_range

    def __init__(
        self,
        method: str = "twn",
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        super().__init__(momentum, axis, gradient_clip, nonfinite)
        self.method = method

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        params = ternary_params(x, "twn", ranks()) if self.method == "twn" else ternary_params(gather_rows(x), "exact")
        return tuple(p if self.axis is not None else p.squeeze(0) for p in params)

    def numbers_at(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return scale / 2, scale

    def format_with(self, *numbers: Tensor) -> ScaledFormat:
        threshold, alpha = numbers
        return Ternary(alpha, threshold, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[TernaryQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls("twn", axis, gradient_clip=True), cls("exact", axis)]
