"""Hadamard rotations before each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

from torch import Tensor

from torchquant._arguments import Bounds, Count
from torchquant.errors import ConfigError
from torchquant.ptq.functional.orthogonal import hadamard, hadamard_block, hadamard_factors, random_signs
from torchquant.ptq.readers import Readers
from torchquant.ptq.stage import PTQ, InputStage
from torchquant.qmodule import InputTransform, Rotation

LARGEST_FACTOR = 64
"""Rows of the largest factor of a matrix of powers of two: two small products cost less than one large one."""


@PTQ.register("rotate")
class Rotate(InputStage):
    """Rotate the inputs of each layer by a Hadamard matrix with random signs, so that no channel has outliers.

    `block`: rows of the matrix, which is repeated along the channels; None takes that of a format with blocks (MX,
    NVFP4), else the largest that divides the channels. `seeds`: choices of signs to compare by the output error; the
    batches are not needed for 1.
    """

    source = "Ashkboos et al. 2024, arXiv:2404.00456; blocks: arXiv:2511.04214"
    when = "first, activations with outliers, at 8 bits and less"
    cost = "rows K n for each seed"
    needs_data = False

    def __init__(self, seeds: Count = 1, block: Annotated[int, Bounds(2)] | None = None) -> None:
        self.seeds, self.block = seeds, block

    def candidates(self, readers: Readers) -> Iterable[tuple[str, InputTransform]]:
        n_channels, per_group = readers.n_channels, readers.n_channels // readers.n_groups
        block = self.block or hadamard_block(math.gcd(per_group, *readers.format_blocks()))
        if block == 1:
            raise ConfigError(f"no Hadamard matrix divides its {per_group} channels")
        matrices = hadamard_matrices(block)
        for seed in range(self.seeds):
            signs = random_signs(n_channels, readers.generator)
            yield f"blocks of {block}, signs {seed}", Rotation(signs, matrices, readers.axis)


def hadamard_matrices(n: int) -> list[Tensor]:
    """Matrices whose Kronecker product is `hadamard(n)`, of at most 64 rows each but for a Paley factor.

    >>> [len(matrix) for matrix in hadamard_matrices(3584)]
    [64, 2, 28]
    """
    power, base = hadamard_factors(n) or (1, n)
    found = []
    while power > 1:
        size = min(power, LARGEST_FACTOR)
        found.append(hadamard(size).float())
        power //= size
    return [*found, *([hadamard(base).float()] if base > 1 else [])]
