"""Affine (uniform integer) quantizer. Maths: quantizers_functional/affine.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._modes import has_hooks
from torchquant.quantizers._base import QUANTIZERS, About, UniformQuantizer
from torchquant.quantizers_functional._gradient import Clamp, apply_at_once
from torchquant.quantizers_functional._recording import current_recorder
from torchquant.quantizers_functional.affine import AffineParams, affine_grid, affine_rule, check_affine
from torchquant.quantizers_functional.formats import UniformGrid
from torchquant.quantizers_functional.kernels import KERNELS
from torchquant.range_observers import BatchMinMax, RangeObserver
from torchquant.range_observers.min_max import MinMax

_STEPS = frozenset({"pre_observe", "forward", "quantize", "format", "affine_params"})
"""The methods that observing and quantizing in one call stands for."""


@QUANTIZERS.register("affine")
class AffineQuantizer(UniformQuantizer):
    """A uniform grid over the observed range that always contains real 0.

    `n_bits` 1..24. `range_observer` determines the range, per tensor or per channel (its `axis`).
    `symmetric`: False (0..2**n-1 codes and a zero point), True (the published grid), "narrow"
    (weights), "full" (signed activations), "torch" (its unsigned codes), "asymmetric-narrow" (NNI's signed ones); see
    `affine_params`.
    `gradient_clip=True` stops the gradient of elements whose code saturates; the published code masks on the
    quantized value and so loses in-range elements (docs/algorithms.md I-3). Raises ConfigError.

    >>> import torch
    >>> quantizer = AffineQuantizer(4, BatchMinMax(), symmetric="narrow")
    >>> quantizer.pre_observe(torch.tensor([3.9, 7.2, -10.0]))
    >>> quantizer(torch.tensor([3.9, 7.2, -10.0]))
    tensor([  4.2857,   7.1429, -10.0000])
    """

    typical = "{name}:{n},symmetric=narrow/channel"
    about = About(
        formula="(clamp(RHE(x / delta) + z) - z) * delta, range from an observer",
        paper="Jacob et al. 2018, arXiv:1712.05877",
        bits="1..24",
    )

    def __init__(
        self,
        n_bits: int,
        range_observer: RangeObserver,
        symmetric: bool | str = False,
        gradient_clip: bool = False,
    ) -> None:
        check_affine(n_bits, symmetric)
        super().__init__(n_bits, range_observer, gradient_clip)
        self.symmetric = symmetric

    def affine_params(self) -> AffineParams:
        return affine_grid(*self.observer.get_ranges(), self.n_bits, self.symmetric)

    def observe_and_quantize(self, x: Tensor, clamp: Clamp | None = None) -> Tensor | None:
        rule = affine_rule(self.n_bits, self.symmetric)
        observer, recorder = self.observer, current_recorder()
        if (
            rule is None
            or torch.compiler.is_compiling()
            or not isinstance(observer, MinMax)
            or has_hooks(self, or_all=True)
            or not self.is_open_as(AffineQuantizer, _STEPS)
            or (recorder is not None and recorder.may_change(self.gradient, x, clamp))
            or KERNELS.find(UniformGrid, x.device.type) is not None
        ):
            return None

        def project(x: Tensor, is_strict: bool, wants_inside: bool) -> tuple[Tensor, Tensor | None] | None:
            return observer.observe_and_project(x, rule, clamp, is_strict, wants_inside)

        return apply_at_once(x, project, self.gradient, clamp)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[AffineQuantizer]:
        """Return the instances on which the laws are checked."""
        settings: list[tuple[int, bool | str, bool]]
        settings = [
            (8, False, True),
            (4, True, False),
            (4, "narrow", True),
            (2, "full", False),
            (1, False, True),
            (4, "torch", True),
            (4, "asymmetric-narrow", False),
        ]
        return [cls(bits, BatchMinMax(axis), symmetric, clip) for bits, symmetric, clip in settings]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, symmetric={self.symmetric!r}, gradient={self.gradient!r}"
