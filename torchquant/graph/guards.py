"""Record values that Python reads in a forward besides its arguments, so that later changes are detected."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant.graph.fingerprint import ABSENT, fingerprint

STORES = ("_parameters", "_buffers")
"""Attributes in which a module holds tensors by name."""


@dataclass(frozen=True)
class Guard:
    """A value that Python read while a forward was traced: an attribute of a module, or a global name.

    `where`: path of the module within the traced one, or, if `is_global`, name of the Python module.
    """

    where: str
    name: str
    value: Any
    is_global: bool = False


def read_now(module: nn.Module, name: str) -> Any:
    """Return the fingerprint of an attribute, as a guard holds it."""
    own = vars(module)
    if name in own:
        return fingerprint(own[name])
    for store in STORES:
        if name in own[store]:
            return fingerprint(own[store][name])
    if name in own["_modules"]:
        return fingerprint(own["_modules"][name])
    for kind in type(module).__mro__:
        if name in vars(kind):
            value = vars(kind)[name]
            return ABSENT if callable(value) or hasattr(value, "__get__") else fingerprint(value)
    return "missing"


def read_global(module: str, name: str) -> Any:
    """Return the fingerprint of a global name of a Python module."""
    found = vars(sys.modules[module]) if module in sys.modules else {}
    return fingerprint(found[name]) if name in found else "missing"


class Missing:
    """Stands for an attribute or global that does not exist."""


class Unseen:
    """Stands for a value that was not read yet."""


def found_on(module: nn.Module, name: str) -> Any:
    """Return the attribute itself that `read_now` describes, from the module or its class, else Missing."""
    own = module.__dict__
    if name in own:
        return own[name]
    for store in (*STORES, "_modules"):
        if name in own[store]:
            return own[store][name]
    return getattr(type(module), name, Missing)


def found_global(module: str, name: str) -> Any:
    """Return the value of a global name of a Python module, or Missing."""
    return vars(sys.modules[module]).get(name, Missing) if module in sys.modules else Missing
