"""Cutout (DeVries and Taylor 2017, arXiv:1708.04552)."""

from __future__ import annotations

import torch
from torch import Tensor


class Cutout:
    """Sets `n_holes` squares of `length` pixels, at random places, of an image (C, H, W) to 0.

    A square may reach over the edge. The places come from torch's generator, so that every worker of a loader draws
    its own.
    """

    def __init__(self, n_holes: int, length: int) -> None:
        self.n_holes = n_holes
        self.length = length

    def __call__(self, img: Tensor) -> Tensor:
        kept, half = torch.ones_like(img), self.length // 2
        for _ in range(self.n_holes):
            y, x = (int(torch.randint(size, ())) for size in img.shape[1:])
            kept[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return img * kept
