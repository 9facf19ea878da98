"""PACT: activations with a learned clip. Maths: quantizers_functional/pact.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedQuantizer, first, or_one
from torchquant.quantizers_functional._row_statistics import row_mean_squares, usable_scale
from torchquant.quantizers_functional.formats import Format, UniformGrid
from torchquant.quantizers_functional.lsq import NARROW_STEP, lsq_codes
from torchquant.quantizers_functional.pact import pact_quantize
from torchquant.range_observers._distributed import reduce_mean
from torchquant.range_observers._statistics import per_channel_view, rows


@QUANTIZERS.register("pact")
class PACTQuantizer(LearnedQuantizer):
    """Activations clipped to [0, alpha], alpha trained (Choi et al. 2018, arXiv:1805.06085; docs/algorithms.md B4).

    It replaces a ReLU: values below 0 become 0. `init="mse"` starts alpha where the error is least on the positive half
    of a Gaussian of that size, a number starts it there (paper: 6.0). Add `pact_penalty(model)` to the
    loss: without it, and with nothing clipped, alpha has no gradient. `calibrated`: the gradient of alpha counts the
    rounding error too (Jin et al. 2019, SAT, arXiv:1912.10207). alpha is never used below a thousandth of its first
    value. Raises ConfigError.

    >>> quantizer = PACTQuantizer(4, init=6.0)
    >>> quantizer.pre_observe(torch.tensor([1.0]))
    >>> quantizer(torch.tensor([-1.0, 2.1, 7.0])).tolist()
    [0.0, 2.0, 6.0]
    """

    sites = ("input", "output")
    learned = ("alpha",)
    statistics = ("initial_alpha",)
    joined_by = {"initial_alpha": "rms"}
    signed = False
    is_uniform = True
    typical = "affine:{n},symmetric=narrow/channel"  # weights to compare its activations with
    typical_acts = "pact:{n}"
    about = About(
        "clamp(x, 0, alpha) in 2**n - 1 equal steps, alpha learned", "Choi et al. 2018, arXiv:1805.06085", "1..11"
    )
    calibrated = False
    initial_alpha: Tensor
    alpha: Tensor

    def __init__(
        self,
        n_bits: int,
        init: float | str = "mse",
        axis: int | None = None,
        nonfinite: str = "raise",
        calibrated: bool = False,
    ) -> None:
        lsq_codes(n_bits, False)
        if not (init == "mse" or (isinstance(init, int | float) and init > 0)):
            raise ConfigError(f"init must be 'mse' or a number > 0, got {init!r}")
        super().__init__(axis, nonfinite)
        self.n_bits = n_bits
        self.init = init
        self.calibrated = calibrated

    @property
    def code_range(self) -> tuple[int, int]:
        return lsq_codes(self.n_bits, False)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        square = reduce_mean(row_mean_squares(rows(x.clamp_min(0.0), self.axis)))
        if isinstance(self.init, str):
            alpha = square.sqrt() * (2**0.5 * NARROW_STEP[self.n_bits + 1] * self.code_range[1])
        else:
            alpha = torch.where(square.isfinite(), torch.full_like(square, self.init), square)
        return first((or_one(usable_scale(alpha, 4.0)),), self.axis)

    def grid(self) -> tuple[Tensor | int, ...]:
        """Return the alpha in use."""
        return (self.bounded("alpha"),)

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        alpha = per_channel_view(self.bounded("alpha"), x.ndim, self.axis)
        return pact_quantize(x, alpha, self.n_bits, self.calibrated)

    def format(self) -> Format:
        low, high = self.code_range
        return UniformGrid(self.bounded("alpha"), 0, low, high, divisor=high, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[PACTQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(4, axis=axis), cls(8, axis=axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, init={self.init!r}, {super().extra_repr()}"


@checked
def pact_penalty(model: nn.Module, weight: float = 2e-4) -> Tensor:
    """Return `weight * sum of alpha**2` over the PACT quantizers of a model, to add to the loss; 0 if there are none.

    Leave alpha out of weight decay then (`torchquant.quantizer_parameters`), or it is counted twice.

    >>> quantizer = PACTQuantizer(4, init=6.0)
    >>> quantizer.pre_observe(torch.tensor([1.0]))
    >>> f"{pact_penalty(quantizer).item():.4f}"
    '0.0072'
    """
    alphas = [module.bounded("alpha") for module in model.modules() if isinstance(module, PACTQuantizer)]
    return torch.stack([alpha.square().sum() for alpha in alphas]).sum() * weight if alphas else torch.zeros(())
