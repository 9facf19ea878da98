"""Write a quantizer of your own: a grid that is denser near zero, `alpha * sign(code) * (code / largest)**2`.

Run it with `python examples/write_a_quantizer.py`. The base class adds the gradient, half-precision types, channels,
checkpoints and the check for NaN.
"""

import torch
from torch import nn

from torchquant import QModuleState, QWrapper, check_quantizer, qmodule_state
from torchquant.quantizers import FittedQuantizer


class SquareQuantizer(FittedQuantizer):
    statistics = ("alpha",)  # the numbers of the grid

    def __init__(self, n_bits: int, axis: int | None = None) -> None:
        super().__init__(axis=axis)
        self.n_bits = n_bits

    @property
    def code_range(self):
        return 1 - 2 ** (self.n_bits - 1), 2 ** (self.n_bits - 1) - 1

    def measure(self, x):  # data -> the numbers, () or (C,) each
        absmax = x.abs().amax() if self.axis is None else x.abs().movedim(self.axis, 0).flatten(1).amax(1)
        return (absmax.clamp_min(2.0**-100),)

    def codes(self, x, alpha):  # real -> code
        return x.sign() * ((x / alpha).abs().sqrt() * self.code_range[1]).round().clamp(*self.code_range)

    def values(self, codes, dtype, alpha):  # code -> real
        return codes.sign() * (codes.to(dtype) / self.code_range[1]).square() * alpha.to(dtype)


for axis in (None, 0):
    print(check_quantizer(SquareQuantizer(4, axis)))

layer = QWrapper([nn.Conv2d(3, 8, 3), nn.ReLU()], weight_quantizer=SquareQuantizer(4, axis=0), acts_quantizer=None)
with qmodule_state(layer, QModuleState.QUANT_AWARE_TRAIN):
    layer(torch.randn(1, 3, 8, 8)).square().mean().backward()
print("levels of channel 0:", layer.weight_quantizer.levels()[0])
assert layer.weight_quantizer(layer.float_weight())[0].unique().numel() <= 2**4
