"""Names of AutoQNN that are not here, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def refused_names(address: str, reasons: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that says why it lacks names which AutoQNN has."""

    def refuse(name: str) -> Any:
        if name in reasons:
            raise AttributeError(f"{address}.{name} is not here: {reasons[name]}")
        raise AttributeError(f"module {address!r} has no attribute {name!r}")

    return refuse
