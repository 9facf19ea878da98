"""The functions on grids of pinned quantizers: every result is what its quantizer makes of it, bit for bit."""

from __future__ import annotations

import pytest
import torch

import torchquant as tq
from tests.ptq.oracles import error_of, random_gram
from torchquant.ptq.functional.columns import activation_order, gptq
from torchquant.ptq.functional.gram import output_error
from torchquant.ptq.functional.learned_rounding import hard_weight, rounding_share
from torchquant.ptq.functional.mismatch import gpfq, qronos
from torchquant.ptq.functional.refits import best_rows, coordinate_descent
from torchquant.ptq.functional.sign_rounding import sign_rounding

SPECS = (
    "affine:3/channel",
    "affine:4/group=5",
    "esb:4,k=1/channel",
    "pot:3/channel",
    "apot:4",
    "twn/channel",
    "residual:2/channel",
    "fp4_e2m1/channel",
    "nf4/group=5",
    "mxfp4",
    "nvfp4",
)
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(4, 12, generator=GENERATOR)
GRAM = random_gram(40, 12, GENERATOR)


@pytest.mark.parametrize("spec", SPECS)
def test_roundings_stay_on_the_grid_of_a_pinned_quantizer(spec: str) -> None:
    quantizer = tq.make_quantizer(spec)
    quantizer.pin(WEIGHT)
    to_nearest = quantizer(WEIGHT).detach()
    below, above = quantizer.neighbours(WEIGHT)
    order = activation_order(GRAM)
    roundings = {
        "gptq": gptq(WEIGHT, GRAM, quantizer.nearest),
        "gptq in order": gptq(WEIGHT, GRAM, quantizer.nearest, order),
        "gpfq": gpfq(WEIGHT, GRAM, GRAM, quantizer.nearest),
        "qronos": qronos(WEIGHT, GRAM, GRAM, quantizer.nearest),
        "descent": coordinate_descent(WEIGHT, to_nearest, GRAM, quantizer.nearest),
        "signs": sign_rounding(WEIGHT, below, above, lambda q: output_error(WEIGHT - q, GRAM).sum(), 20)[0],
        "shares": hard_weight(rounding_share(WEIGHT, below, above), below, above),
    }
    for name, rounded in roundings.items():
        assert torch.equal(quantizer(quantizer.preimage(rounded)), rounded), name
    least = error_of((WEIGHT - to_nearest).double(), GRAM)
    for name in ("descent", "signs"):
        assert error_of((WEIGHT - roundings[name]).double(), GRAM) <= least + 1e-9
    best = best_rows([to_nearest, *roundings.values()], WEIGHT, GRAM)
    assert error_of((WEIGHT - best).double(), GRAM) < least
