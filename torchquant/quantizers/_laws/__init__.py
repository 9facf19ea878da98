"""The laws every quantizer must keep, as a function anybody can call on theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor

from torchquant._arguments import checked
from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError, LawViolation, UnknownNameError
from torchquant.quantizers._base import Quantizer
from torchquant.quantizers._laws.case import Case, Skip
from torchquant.quantizers._laws.case import LawReport as LawReport
from torchquant.quantizers._laws.devices import keeps_device
from torchquant.quantizers._laws.form import edge_cases, keeps_form, nonfinite
from torchquant.quantizers._laws.gradients import gradient, gradient_size
from torchquant.quantizers._laws.grid import idempotent, levels_used, monotone, on_grid, per_channel
from torchquant.quantizers._laws.rounding import columns, neighbours, pins, roundings
from torchquant.quantizers._laws.state import compiles, memoryless, settable, survives
from torchquant.quantizers._laws.training import trained

LAWS: dict[str, Callable[[Case], None]] = {
    law.__name__: law
    for law in (
        on_grid,
        levels_used,
        idempotent,
        monotone,
        keeps_form,
        edge_cases,
        nonfinite,
        per_channel,
        memoryless,
        neighbours,
        columns,
        roundings,
        pins,
        settable,
        trained,
        gradient,
        gradient_size,
        survives,
        keeps_device,
        compiles,
    )
}


@checked
def check_quantizer(
    quantizer: Quantizer, sample: Tensor | None = None, laws: tuple[str, ...] | None = None
) -> LawReport:
    """Run the laws (`LAWS`) on a quantizer, ours or yours; nothing happens to the one you pass.

    `sample`: float tensor the quantizer is shown first, default N(0, 1) of shape (4, 6, 5, 5); pass one
    if yours takes only some data, e.g. not below 0. `laws`: names out of `LAWS`, default all.
    Raises ConfigError; LawViolation that names every law that fails and what was seen.

    >>> from torchquant import AffineQuantizer, BatchMinMax
    >>> report = check_quantizer(AffineQuantizer(4, BatchMinMax()), laws=("on_grid", "monotone"))
    >>> report.passed
    ('on_grid', 'monotone')
    """
    passed, skipped, broken = [], {}, {}
    unknown = [name for name in laws or () if name not in LAWS]
    if unknown:
        raise UnknownNameError(
            f"no law is called {shown(unknown[0])};{did_you_mean(unknown[0], LAWS)} Known: {', '.join(LAWS)}"
        )
    if sample is not None and not (sample.is_floating_point() and sample.numel()):
        raise ConfigError(f"the sample must be a tensor of real numbers with one at least, got {shown(sample)}")
    case: Case | None = None
    for name in LAWS if laws is None else laws:
        try:
            case = Case(quantizer, sample) if case is None else case
            LAWS[name](copy.deepcopy(case))
        except Skip as why:
            skipped[name] = str(why)
        except Exception as error:  # a law that crashes is a law that fails
            broken[name] = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
        else:
            passed.append(name)
    if broken:
        raise LawViolation(", ".join(broken), "; ".join(f"[{n}] {d}" for n, d in broken.items()))
    return LawReport(tuple(passed), skipped)
