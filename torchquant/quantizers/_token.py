"""Per-token granularity: a grid for each row of the last axis. Maths: quantizers_functional/tokens.py."""

from __future__ import annotations

from torch import Tensor

from torchquant.quantizers._base import About, OwnScaleQuantizer
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.tokens import TokenGrid, check_token_bits


class TokenQuantizer(OwnScaleQuantizer):
    """A symmetric grid per token, a row of the last axis, over the largest magnitude in it, computed at every call.

    It suits inputs of linear layers, whose sums run along that axis: a token's scale can be taken out of the sum.
    Nothing is observed, so no calibration is needed. `n_bits` 2..8. The scale is a bfloat16; a code holds its 16 bits
    above those of the element. Raises ConfigError.

    >>> import torch
    >>> TokenQuantizer(3)(torch.tensor([[3.0, 0.9, -1.6], [30.0, 9.0, -16.0]]))
    tensor([[  3.,   1.,  -2.],
            [ 30.,  10., -20.]])
    """

    sites = ("input", "output")
    about = About(
        "clamp(RHE(x / delta)) * delta, delta = max|x| of the token / (2**(n-1) - 1)",
        "Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339; Yao et al. 2022, ZeroQuant, arXiv:2206.01861",
        "2..8",
        ("token",),
    )

    def __init__(self, n_bits: int) -> None:
        check_token_bits(n_bits)
        super().__init__()
        self.n_bits = n_bits

    def parts(self, x: Tensor) -> list[Tensor]:
        return list(x.reshape(-1, x.shape[-1])) if x.ndim and x.numel() else [x.flatten()]

    def side_bytes(self, x: Tensor) -> int:
        """Return two bytes per token."""
        return 2 * len(self.parts(x))

    def format(self) -> Format:
        return TokenGrid(self.n_bits)

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}"
