"""Quantization interval learning. Maths: quantizers_functional/qil.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import LearnedQuantizer, first, or_one
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional._row_statistics import row_mean_squares, usable_scale
from torchquant.quantizers_functional.lsq import NARROW_STEP
from torchquant.quantizers_functional.qil import check_qil, qil_preimage, qil_quantize, qil_transform, unit_grid
from torchquant.range_observers._distributed import reduce_mean
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("qil")
class QILQuantizer(LearnedQuantizer):
    """A trained interval of magnitudes: smaller ones become 0, larger ones 1 (Jung et al. 2019, arXiv:1808.05779).

    Weights lose their units, as with `dorefa`: the levels are in [-1, 1] whatever their scale, so a batch norm should
    follow. Trained: centre and half length of the interval, and for weights the power gamma of the position in it. The
    paper starts from a network of more bits; here the interval starts at 0, and ends where the error of a Gaussian is
    least. `activation` selects the form for activations, without a power; in spec strings the default for every slot
    but the weight. Deviation: its levels are in [0, reach], reach the end of the interval at the start; without units,
    the values behind it would be smaller than those on which the next interval was measured. Raises ConfigError.

    >>> quantizer = QILQuantizer(3)
    >>> quantizer.pre_observe(torch.tensor([0.62, -0.41, 0.1, 0.9]))
    >>> quantizer.set_numbers(centre=0.5, distance=0.35, gamma=1.0)
    >>> quantizer(torch.tensor([0.62, -0.41, 0.1, 0.9])).detach()
    tensor([ 0.6667, -0.3333,  0.0000,  1.0000])
    """

    is_idempotent = False
    joined_by = {"initial_centre": "rms", "initial_distance": "rms"}
    typical_acts = "qil:{n}"
    about = About(
        "sign(x) RHE(q clamp((|x| - centre + distance) / (2 distance), 0, 1)**gamma) / q, all three learned",
        "Jung et al. 2019, QIL, arXiv:1808.05779",
        "2..8 (1..8)",
    )

    def __init__(
        self, n_bits: int, activation: bool = False, axis: int | None = None, nonfinite: str = "raise"
    ) -> None:
        check_qil(n_bits, activation)
        self.learned = ("centre", "distance") if activation else ("centre", "distance", "gamma")
        self.statistics = (*(f"initial_{name}" for name in self.learned), *(("reach",) if activation else ()))
        super().__init__(axis, nonfinite)
        self.set_once = frozenset(self.statistics)
        self.n_bits = n_bits
        self.activation = activation
        self.signed = not activation

    @property
    def code_range(self) -> tuple[int, int]:
        return unit_grid(self.n_bits, self.activation).code_range

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        x = rows(x.clamp_min(0.0) if self.activation else x, self.axis)
        rms = reduce_mean(row_mean_squares(x)).sqrt()
        step = 2**0.5 * NARROW_STEP[self.n_bits + 1] if self.activation else NARROW_STEP[self.n_bits]
        half = or_one(usable_scale(rms * (step * self.code_range[1] / 2), 4.0))
        return first((half, half, 2.0 * half if self.activation else torch.ones_like(half)), self.axis)

    def grid(self) -> tuple[Tensor, ...]:
        """Return centre and distance, and the power of weights or the largest level of activations."""
        last = self.get()[2] if self.activation else self.bounded("gamma")
        return self.bounded("centre"), self.bounded("distance"), last

    def quantize(self, x: Tensor) -> Tensor:  # type: ignore[override]
        centre, distance, last = self.grid_for(x)
        if not self.activation:
            return qil_quantize(x, centre, distance, self.n_bits, last)
        real = x.to(compute_dtype(x))
        unit = qil_quantize(real, centre, distance, self.n_bits, activation=True)
        return cast_back(unit * last.to(unit.dtype), x.dtype)

    def codes(self, x: Tensor, *grid: Any) -> Tensor:
        centre, distance, last = (number.to(x.dtype) for number in grid)
        unit = qil_transform(x, centre, distance, None if self.activation else last)
        return unit_grid(self.n_bits, self.activation).codes(unit)

    def values(self, codes: Tensor, dtype: torch.dtype, *grid: Any) -> Tensor:
        unit = unit_grid(self.n_bits, self.activation).values(codes, dtype)
        return unit * grid[2].to(dtype) if self.activation else unit

    @torch.no_grad()
    def preimage(self, values: Tensor) -> Tensor:
        centre, distance, last = self.grid_for(values)
        if self.activation:
            return qil_preimage(values.float() / last, centre, distance, None).to(values.dtype)
        return qil_preimage(values.float(), centre, distance, last).to(values.dtype)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[QILQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(3, axis=axis)]

    def extra_repr(self) -> str:
        form = "activation" if self.activation else "weight"
        return f"n_bits={self.n_bits}, {form}, {super().extra_repr()}"
