"""AutoQNN's elastic significant bits."""

from __future__ import annotations

from typing import Any

from torchquant.compat.autoqnn.quantizers._scheme import Activation, Scheme
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import ESBQuantizer


class ESB_PerChannel(Scheme, ESBQuantizer, Quantization):  # noqa: N801 - published name
    """ESB with `linear_bits` significant bits; `mean_shift` centres the levels on the mean.

    One bit is the sign and 1 to 4 bits are the exponent, as in AutoQNN: `linear_bits` becomes the number that is left.

    >>> ESB_PerChannel(bitwidth=4, linear_bits=1, per_channel=False, mean_shift=False).significant_bits
    1
    """

    spec = "esb:{n}"
    linear_bits: int
    mean_shift: bool

    def __init__(
        self,
        bitwidth: int = 8,
        linear_bits: int = 4,
        per_channel: bool = True,
        mean_shift: bool = False,
        **kwargs: Any,
    ) -> None:
        self.__dict__.update(linear_bits=linear_bits, mean_shift=mean_shift)
        super().__init__(bitwidth, per_channel=per_channel, **kwargs)

    def _spec(self, n_bits: int, momentum: float | None) -> str:
        exponent = min(4, max(1, n_bits - self.linear_bits - 1))
        self.__dict__["linear_bits"] = n_bits - exponent - 1
        shape = f",k={self.linear_bits},center={str(self.mean_shift).lower()}"
        return self.spec.format(n=n_bits) + shape + ("" if momentum is None else f",momentum={momentum}")


class ESBAct(Activation, ESB_PerChannel):
    """ESB for activations."""

    def __init__(
        self,
        bitwidth: int = 8,
        linear_bits: int = 4,
        per_channel: bool = False,
        mean_shift: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(bitwidth, linear_bits, per_channel, mean_shift, **kwargs)
