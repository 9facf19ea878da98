"""`torchquant algorithms`: the stages of post-training recipes."""

from __future__ import annotations

import inspect
from typing import Annotated

from torchquant.cli._options import Argument
from torchquant.cli._tables import show_all, show_one
from torchquant.ptq import PTQ
from torchquant.ptq.stage import LayerStage


def columns(name: str) -> dict[str, str]:
    """Describe a stage as one row of the table."""
    kind = PTQ[name]
    parameters = inspect.signature(kind).parameters.values()
    options = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    if issubclass(kind, LayerStage):
        needs = sorted(kind().needs)
    else:
        needs = ["blocks"] if kind.unit == "block" else ["batches"] * getattr(kind, "needs_data", False)
    return {
        "stage": name,
        "changes": kind.changes,
        "looks at": ", ".join(needs) or "no data",
        "options": options,
        "when": kind.when,
        "cost": kind.cost or "-",
        "source": kind.source,
    }


def command(
    name: Annotated[str | None, Argument("One stage.")] = None,
) -> None:
    """Show the post-training algorithms, which `torchquant ptq` runs."""
    if name is None:
        show_all("post-training stages", [columns(name) for name in PTQ])
        return
    show_one({**columns(name), "what it does": inspect.cleandoc(PTQ[name].__doc__ or "")})
