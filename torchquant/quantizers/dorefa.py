"""DoReFa. Maths: quantizers_functional/dorefa.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About, FittedQuantizer
from torchquant.quantizers._learned import first, largest_of
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional._row_statistics import row_mean_magnitudes, usable_scale
from torchquant.quantizers_functional.binary import binary_codes, binary_quantize
from torchquant.quantizers_functional.dorefa import (
    check_dorefa,
    dorefa_act_quantize,
    dorefa_gradient,
    dorefa_preimage,
    dorefa_weight_quantize,
    sat_gain,
    signed_values,
    squashed,
    unit_codes,
    unit_values,
)
from torchquant.range_observers._distributed import ranks, reduce_mean
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("dorefa")
class DoReFaQuantizer(FittedQuantizer):
    """Weights squashed by tanh to [-1, 1], or activations in [0, 1] (Zhou et al. 2016, arXiv:1606.06160; B7).

    Weights lose their units: the levels are in [-1, 1] whatever their scale, so a batch norm should follow. At
    1 bit: `sign(w) E|w|`. `activation` selects the form for activations, in spec strings the default for every slot
    but the weight. `gradient_bits` then also quantizes the incoming gradient, with noise (docs/algorithms.md B7).
    `rescale` (weights of 2 bits or more, per tensor) multiplies the levels by `1 / sqrt(n_out Var)`, for layers without
    batch norm (Jin et al. 2019, SAT, arXiv:1912.10207). The scheme defines its own gradient; there is none to choose.
    Raises ConfigError.

    >>> quantizer = DoReFaQuantizer(2)
    >>> quantizer.pre_observe(torch.tensor([-1.0, -0.2, 0.1, 0.5]))
    >>> quantizer(torch.tensor([-1.0, -0.2, 0.1, 0.5]))
    tensor([-1.0000, -0.3333,  0.3333,  0.3333])
    """

    statistics: tuple[str, ...] = ("scale",)
    rescale = False
    joined_by = {"scale": "max"}
    typical_acts = "dorefa:{n}"
    about = About(
        "2 RHE(s (tanh w / 2 max|tanh w| + 1/2)) / s - 1, s = 2**n - 1; activations RHE(s clamp(x, 0, 1)) / s",
        "Zhou et al. 2016, arXiv:1606.06160",
        "1..16",
    )

    def __init__(
        self,
        n_bits: int,
        activation: bool = False,
        gradient_bits: int | None = None,
        axis: int | None = None,
        nonfinite: str = "raise",
        rescale: bool = False,
    ) -> None:
        check_dorefa(n_bits)
        if gradient_bits is not None:
            check_dorefa(gradient_bits, "gradient_bits")
            if not activation:
                raise ConfigError("gradient_bits quantizes the gradient of an activation, not that of a weight")
        if rescale and (activation or axis is not None or n_bits == 1):
            raise ConfigError(
                "rescale=True takes the variance of a whole weight, so it is for weights, per tensor, of 2 bits or "
                f"more; got activation={activation}, axis={axis}, n_bits={n_bits}"
            )
        if rescale:
            self.statistics = ("scale", "gain")
        super().__init__(0.0, axis, False, nonfinite)
        self.rescale = rescale
        self.n_bits = n_bits
        self.activation = activation
        self.gradient_bits = gradient_bits
        self.signed = not activation
        self.is_idempotent = activation

    @classmethod
    def gradients(cls) -> tuple[str, ...]:
        """Return no names: the scheme defines its own gradient."""
        return ()

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, 2**self.n_bits - 1

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        each = rows(x, self.axis)
        if self.n_bits > 1 or self.activation:
            scale = largest_of(each)
        else:
            scale = usable_scale(row_mean_magnitudes(each, ranks()), 1.0)
        found = first((scale,), self.axis)
        return (*found, self._gain(x.to(torch.float64), *found)) if self.rescale else found

    def _gain(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return the factor of the levels in [-1, 1] with which the weight has the variance of SAT; 0 for zeros."""
        unit = unit_values(self.codes(x, scale), self.n_bits) * 2.0 - 1.0
        return torch.where(scale == 0, scale.to(unit.dtype), reduce_mean(sat_gain(unit)))

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        scale, *gain = self.grid_for(x)
        if self.activation:
            x = x if self.gradient_bits is None else dorefa_gradient(x, self.gradient_bits)
            return dorefa_act_quantize(x, self.n_bits)
        if self.n_bits == 1:
            return binary_quantize(x, scale)
        if gain:
            return cast_back(dorefa_weight_quantize(x.to(compute_dtype(x)), scale, self.n_bits) * gain[0], x.dtype)
        return dorefa_weight_quantize(x, scale, self.n_bits)

    def codes(self, x: Tensor, *grid: Any) -> Tensor:
        if self.activation:
            return unit_codes(x, self.n_bits)
        if self.n_bits == 1:
            return binary_codes(x)
        return unit_codes(squashed(x, grid[0].to(x.dtype)), self.n_bits)

    def values(self, codes: Tensor, dtype: torch.dtype, *grid: Any) -> Tensor:
        codes = codes.to(dtype)
        if self.activation:
            return unit_values(codes, self.n_bits)
        scale, *gain = (number.to(dtype) for number in grid)
        if gain:
            return (unit_values(codes, self.n_bits) * 2.0 - 1.0) * gain[0]
        if self.n_bits == 1:
            return (codes * 2.0 - 1.0) * scale
        return signed_values(unit_values(codes, self.n_bits), scale)

    @torch.no_grad()
    def preimage(self, values: Tensor) -> Tensor:
        if self.activation or self.n_bits == 1:
            return values
        scale, *gain = self.grid_for(values)
        return dorefa_preimage(values / gain[0] if gain else values, scale).to(values.dtype)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[DoReFaQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(4, axis=axis), cls(3, True, 6, axis=axis), cls(1, axis=axis), cls(8, axis=axis)]

    def extra_repr(self) -> str:
        form = "activation" if self.activation else "weight"
        bits = "" if self.gradient_bits is None else f", gradient_bits={self.gradient_bits}"
        return f"n_bits={self.n_bits}, {form}{bits}, {super().extra_repr()}"
