"""Q-format (fixed point) quantizer. Maths: quantizers_functional/qfmt.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About, UniformQuantizer
from torchquant.quantizers_functional._gradient import Clamp, compute_dtype
from torchquant.quantizers_functional.affine import AffineParams
from torchquant.quantizers_functional.qfmt import check_qfmt, qfmt_int_bits, qfmt_params, qfmt_quantize
from torchquant.range_observers import BatchMinMax, RangeObserver
from torchquant.range_observers._distributed import reduce_mean, world_size
from torchquant.range_observers._statistics import ordinary_zeros, per_channel_view, rows

N_CANDIDATES = 4


@QUANTIZERS.register("qfmt")
class QfmtQuantizer(UniformQuantizer):
    """Fixed point: a uniform grid whose step is a power of two, codes always `n_bits` wide.

    `n_bits` 1..24, `signed` or not. `rule` picks the integer bits: "nosat" (default), "sat" (both in
    `qfmt_int_bits`), "mse" (of "nosat" and up to three bits fewer, the least squared error on the
    tensor observed last). An unsigned quantizer refuses data
    below 0 unless `allow_clip=True`; on accelerators and in compiled code, where a check would stall, it clips.
    Raises ConfigError. Source: docs/algorithms.md A2.

    >>> quantizer = QfmtQuantizer(8, True, BatchMinMax())
    >>> quantizer.pre_observe(torch.tensor([-1.0, 0.5]))
    >>> quantizer.affine_params().delta
    tensor(0.0078)
    """

    signed: bool
    typical = "{name}:{n},signed/channel"
    about = About(formula="clamp(RHE(x / delta)) * delta, delta = 2**-f", paper="fixed point, Q(m, f)", bits="1..24")
    fewer_bits: Tensor
    fuses_clamp = True

    def __init__(
        self,
        n_bits: int,
        signed: bool,
        range_observer: RangeObserver,
        gradient_clip: bool = False,
        rule: str = "nosat",
        allow_clip: bool = False,
    ) -> None:
        check_qfmt(n_bits, signed, rule)
        super().__init__(n_bits, range_observer, gradient_clip)
        self.signed = signed
        self.rule = rule
        self.allow_clip = allow_clip
        self.register_buffer("fewer_bits", torch.zeros(()))  # an integer, kept as a float so that it can be averaged

    def numbers(self) -> dict[str, Tensor]:
        """Return the ends of the range, and how many integer bits fewer than the range needs are used."""
        return super().numbers() | {"fewer_bits": self.fewer_bits}

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        fewer_bits = torch.as_tensor(numbers.pop("fewer_bits"), dtype=self.fewer_bits.dtype)
        super()._set_numbers(**numbers)
        self.fewer_bits = ordinary_zeros(fewer_bits.shape, self.fewer_bits).copy_(fewer_bits)

    def affine_params(self) -> AffineParams:
        return self._params(self.fewer_bits.round().to(torch.int64))

    def _params(self, fewer_bits: Tensor | int) -> AffineParams:
        low, high = self.observer.get_ranges()
        m = qfmt_int_bits(low, high, self.n_bits, self.signed, self.rule) - fewer_bits
        return qfmt_params(m, self.n_bits, self.signed, high.dtype)

    def pre_observe(self, x: Tensor, clamp: Clamp | None = None) -> None:
        super().pre_observe(x, clamp)
        if not self.is_ready:
            return
        low, _ = self.observer.get_ranges()
        if not (self.signed or self.allow_clip or torch.compiler.is_compiling() or low.device.type != "cpu"):
            if bool((low < 0).any()):
                lowest = float(low.min())
                self.observer.reset()
                raise ConfigError(
                    f"an unsigned Q-format saw values down to {lowest:.4g}, which it would clip to 0; "
                    "use signed=True, or allow_clip=True if that is wanted"
                )
        if self.rule == "mse":
            self._fit_fewer_bits(x if clamp is None else x.clamp(*clamp))

    @torch.no_grad()
    def _fit_fewer_bits(self, x: Tensor) -> None:
        if x.numel() == 0 and world_size() == 1:
            return
        (errors,) = self.observer.over_ranks(x.detach().to(compute_dtype(x)), self._errors)
        best = errors.argmin(0) if self.axis is not None else errors.argmin(0).squeeze(0)
        if self.fewer_bits.shape != best.shape:
            self.fewer_bits = ordinary_zeros(best.shape, self.fewer_bits)
        self.fewer_bits.copy_(torch.where(errors.isnan().any(), self.fewer_bits, best))

    def _errors(self, x: Tensor) -> tuple[Tensor]:
        """Compute the mean squared error with 0, 1, ... fewer integer bits: (N_CANDIDATES, C)."""
        errors = []
        for fewer in range(N_CANDIDATES):
            delta, _, qmin, qmax = self._params(fewer)
            quantized = qfmt_quantize(x, per_channel_view(delta, x.ndim, self.axis), qmin, qmax)
            errors.append(rows((quantized - x).square(), self.axis).to(torch.float64).mean(1))
        return (reduce_mean(torch.stack(errors)),)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        saved = state_dict.get(prefix + "fewer_bits")
        if saved is not None and saved.shape != self.fewer_bits.shape:
            self.fewer_bits = self.fewer_bits.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]

    @classmethod
    def examples(cls, axis: int | None = None) -> list[QfmtQuantizer]:
        """Return the instances on which the laws are checked."""
        signed = [cls(8, True, BatchMinMax(axis), clip, rule) for clip, rule in ((True, "nosat"), (False, "mse"))]
        return [*signed, cls(4, True, BatchMinMax(axis), rule="sat"), cls(4, False, BatchMinMax(axis), allow_clip=True)]

    def extra_repr(self) -> str:
        sign = "signed" if self.signed else "unsigned"
        return f"n_bits={self.n_bits}, {sign}, rule={self.rule!r}, gradient={self.gradient!r}"
