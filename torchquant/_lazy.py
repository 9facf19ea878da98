"""Names of a package that are loaded when they are first asked for, so that importing it is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, names: Mapping[str, str], modules: tuple[str, ...] = ()) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package. `names`: name -> module that holds it; `modules`: submodules to load.

    >>> find = lazy_names("json", {"JSONDecoder": "json.decoder"})
    >>> find("JSONDecoder").__module__
    'json.decoder'
    """

    def find(name: str) -> Any:
        if name in names:
            found = getattr(import_module(names[name]), name)
        elif name in modules:
            found = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)
        return found

    return find
