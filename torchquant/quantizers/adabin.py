"""Two levels around a centre (AdaBin), for weights and activations. Maths: quantizers_functional/adabin.py."""

from __future__ import annotations

from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedQuantizer, first, gradient_scale, largest_of, or_one
from torchquant.quantizers._midrise import MidriseQuantizer
from torchquant.quantizers_functional._row_statistics import mean_deviation, row_moments, usable_scale
from torchquant.quantizers_functional.adabin import adabin_quantize, two_levels
from torchquant.quantizers_functional.formats import Format
from torchquant.range_observers._distributed import ranks
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("adabin")
class AdaBinQuantizer(MidriseQuantizer):
    """{beta - alpha, beta + alpha} with beta the mean (Tu et al. 2022, AdaBin, arXiv:2208.08084). Codes -1 and 0.

    `scale="std"`: alpha is the standard deviation, as in the paper. "mean": the mean of |x - beta|, which has the least
    squared error. For activations: `adabin_act`. Raises ConfigError.

    >>> import torch
    >>> quantizer = AdaBinQuantizer()
    >>> quantizer.pre_observe(torch.tensor([1.0, 2.0, 5.0, 8.0]))
    >>> quantizer(torch.tensor([1.0, 8.0]))
    tensor([1.2614, 6.7386])
    """

    n_bits = 1
    own_rule = ("scale", "std")
    typical_acts = "adabin_act:{n}"
    about = About(
        "alpha sign(x - beta) + beta, beta = mean, alpha = std", "Tu et al. 2022, AdaBin, arXiv:2208.08084", "1"
    )

    def __init__(
        self,
        scale: str = "std",
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        if scale not in ("std", "mean"):
            raise ConfigError(f"scale must be 'std' (as in the paper) or 'mean' (least squares), got {scale!r}")
        super().__init__(1, axis, momentum, gradient_clip, nonfinite)
        self.scale = scale

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        mean, deviation = row_moments(x, ranks()) if self.scale == "std" else mean_deviation(x, ranks())
        return usable_scale(2.0 * deviation, 2.0), mean

    @classmethod
    def examples(cls, axis: int | None = None) -> list[AdaBinQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls("mean", axis, gradient_clip=True)]


@QUANTIZERS.register("adabin_act")
class AdaBinActQuantizer(LearnedQuantizer):
    """{beta - alpha, beta + alpha} with both numbers trained (Tu et al. 2022, AdaBin, arXiv:2208.08084). Codes -1, 0.

    They start where the squared error of the first tensor is least for beta its mean. Deviation: their gradients are
    scaled as LSQ's step is. Raises ConfigError.

    >>> import torch
    >>> quantizer = AdaBinActQuantizer()
    >>> quantizer.pre_observe(torch.tensor([0.0, 2.0, 4.0]))
    >>> quantizer(torch.tensor([0.0, 3.0])).detach()
    tensor([0.6667, 3.3333])
    """

    n_bits = 1
    code_range = (-1, 0)
    sites = ("input", "output")
    learned = ("alpha", "beta")
    statistics = ("initial_alpha", "initial_beta", "present")
    joined_by = {"initial_alpha": "rms", "present": "max"}
    typical = "adabin:{n}/channel"
    typical_acts = "adabin_act:{n}"
    about = About("alpha sign(x - beta) + beta, both learned", "Tu et al. 2022, AdaBin, arXiv:2208.08084", "1")
    initial_alpha: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, axis: int | None = None, nonfinite: str = "raise") -> None:
        super().__init__(axis, nonfinite)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x, self.axis)
        mean, deviation = mean_deviation(x, ranks())
        return first((or_one(usable_scale(deviation, 4.0)), mean, self.ever_present(largest_of(x))), self.axis)

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha, beta, and whether there is anything but zeros."""
        return self.bounded("alpha"), self.number("beta"), self.statistic("present")

    def format(self) -> Format:
        return two_levels(*self.grid(), axis=self.axis)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        alpha, beta, present = self.grid_for(x)
        scale = gradient_scale(x, self.initial_alpha.numel(), True, 1)
        return adabin_quantize(x, alpha, beta, scale, present)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[AdaBinActQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(axis)]
