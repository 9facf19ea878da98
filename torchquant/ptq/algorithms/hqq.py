"""HQQ: zero points without data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from torchquant._arguments import Count
from torchquant.errors import ConfigError
from torchquant.ptq.functional.half_quadratic import at_zero, half_quadratic_zero
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.stage import PTQ, NumberSearch
from torchquant.quantizers import AffineQuantizer, LSQPlusQuantizer, Quantizer
from torchquant.quantizers._group import PartedQuantizer
from torchquant.range_observers._statistics import rows as rows_of


@PTQ.register("hqq")
class HQQ(NumberSearch):
    """Move the zero point of each channel, group or block so that few weights have large errors. Needs no data.

    For uniform grids that are not symmetric. The offset of `lsqplus:4,offset` takes any zero point; a whole one, as of
    `affine:4`, is the better neighbour of it, or stays. The error is the mean of |error|. `rounds`: at most.
    """

    source = "Badri and Shaji 2023, Half-quadratic quantization of large machine learning models"
    when = "weights of groups without data; a real zero point gains most"
    cost = "20 roundings"

    def __init__(self, rounds: Count = 20) -> None:
        self.rounds = rounds

    def numbers(self, layer: Layer, data: LayerData) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for prefix, quantizer, rows in _parts(layer):
            found |= {f"{prefix}{name}": number for name, number in self._moved(quantizer, rows).items()}
        if all(torch.equal(number, found[name]) for name, number in layer.numbers().items()):
            raise ConfigError("no zero point has a smaller error than the present one")
        return found

    def _moved(self, quantizer: Quantizer, rows: Tensor) -> dict[str, Tensor]:
        """Compute the numbers of a quantizer with one zero point for each of these rows."""
        numbers, rows = quantizer.numbers(), rows.to(torch.float64)
        if isinstance(quantizer, LSQPlusQuantizer) and quantizer.has_offset:
            low, high = quantizer.code_range
            step, offset = (numbers[name].to(torch.float64).view(-1, 1) for name in ("step", "offset"))
            zero = half_quadratic_zero(rows, step, -offset / step, low, high, self.rounds).zero
            return {"step": numbers["step"], "offset": (-step * zero).view_as(numbers["offset"]).to(numbers["offset"])}
        if not isinstance(quantizer, AffineQuantizer) or quantizer.symmetric is not False:
            raise ConfigError(
                f"{type(quantizer).__name__} has no zero point that can be moved; take affine:4, or "
                "lsqplus:4,offset, per channel or in groups"
            )
        grid = quantizer.affine_params()
        step, start = (torch.as_tensor(n, dtype=torch.float64).view(-1, 1) for n in (grid.delta, grid.zero_point))
        real = half_quadratic_zero(rows, step, start, grid.qmin, grid.qmax, self.rounds).zero
        zeros = [zero.clamp(grid.qmin, grid.qmax) for zero in (start, real.floor(), real.ceil())]
        errors = [(rows - at_zero(rows, step, z, grid.qmin, grid.qmax).rounded).abs().mean(1) for z in zeros]
        best = torch.stack(errors).argmin(0)[:, None]
        ends = [(code - torch.stack(zeros).gather(0, best[None])[0]) * step for code in (grid.qmin, grid.qmax)]
        moved = dict(zip(("range_min", "range_max"), ends, strict=True))
        now = {name: number.view(-1, 1) for name, number in numbers.items()}
        return {n: torch.where(best > 0, end.to(now[n]), now[n]).view_as(numbers[n]) for n, end in moved.items()}


def _parts(layer: Layer) -> Iterator[tuple[str, Quantizer, Tensor]]:
    """Yield each quantizer that has numbers of its own, their prefix, and the weights of each of its zero points."""
    quantizer, weight = layer.quantizer, layer.weight.reshape(layer.shape)
    if isinstance(quantizer, PartedQuantizer):
        yield from ((f"{child}_", own, part) for child, own, part in quantizer.by_child(weight))
    else:
        yield "", quantizer, rows_of(weight, quantizer.axis)
