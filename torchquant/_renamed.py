"""Keep renamed public names working, with a warning that says the new name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn at the caller's caller that `old` is called `new`."""
    warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=stacklevel)


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a module with renamed names; `names`: old -> new. Pickles find them too.

    >>> find = renamed_names("torchquant.errors", {"ConfigurationError": "ConfigError"})
    >>> find("Config")
    Traceback (most recent call last):
    AttributeError: module 'torchquant.errors' has no attribute 'Config'
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return find


def renamed_attribute(old: str, new: str) -> property:
    """Make the property for the old name of an attribute."""

    def get(self: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    def put(self: Any, value: Any) -> None:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        setattr(self, new, value)

    return property(get, put, doc=f"The old name of `{new}`.")
