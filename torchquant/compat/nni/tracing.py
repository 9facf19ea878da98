"""`nni.trace`: classes whose instances know the arguments they were made with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torchquant._shown import shown
from torchquant.errors import ConfigError


class Recipe:
    """The call that made an object. `get()` makes a new one, with other keyword arguments if some are given."""

    def __init__(self, symbol: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.trace_symbol, self.trace_args, self.trace_kwargs = symbol, args, kwargs

    def get(self, **changed: Any) -> Any:
        """Call it again."""
        return trace(self.trace_symbol)(*self.trace_args, **{**self.trace_kwargs, **changed})


class Traced:
    """The part of a traced class that remembers the arguments."""

    trace_symbol: type
    trace_args: tuple[Any, ...]
    trace_kwargs: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)  # parameters() can be read once
        kwargs = {name: list(arg) if isinstance(arg, Iterator) else arg for name, arg in kwargs.items()}
        super().__init__(*args, **kwargs)
        self.trace_args, self.trace_kwargs = args, kwargs

    def trace_copy(self) -> Recipe:
        """Return the call that made this object."""
        return Recipe(self.trace_symbol, self.trace_args, self.trace_kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        state: Any = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _blank, (self.trace_symbol,), {**state, "trace_args": self.trace_args, "trace_kwargs": self.trace_kwargs}


def _blank(symbol: type) -> Any:
    made = trace(symbol)
    return made.__new__(made)


def trace(symbol: Any) -> Any:
    """Return a class like `symbol` whose objects remember their arguments; it can decorate a class or a function.

    An object has `trace_symbol`, `trace_args`, `trace_kwargs`, and `trace_copy().get()` makes another one. The result
    of a traced function has them if it can have attributes. Raises ConfigError for what cannot be called.

    >>> import torch
    >>> optimizer = trace(torch.optim.SGD)(torch.nn.Linear(2, 2).parameters(), lr=0.5)
    >>> isinstance(optimizer, torch.optim.SGD), optimizer.trace_kwargs
    (True, {'lr': 0.5})
    """
    if isinstance(symbol, type):
        made: Any = symbol
        return made if issubclass(symbol, Traced) else _traced_class(made)
    if not callable(symbol):
        raise ConfigError(f"nni.trace takes a class or a function, got {shown(symbol)}")

    @functools.wraps(symbol)
    def traced(*args: Any, **kwargs: Any) -> Any:
        made = symbol(*args, **kwargs)
        if hasattr(made, "__dict__") and not is_traceable(made):
            made.trace_symbol, made.trace_args, made.trace_kwargs = symbol, args, kwargs
        return made

    return traced


@functools.cache
def _traced_class(symbol: Any) -> Any:
    words = {name: getattr(symbol, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(symbol.__name__, (Traced, symbol), {**words, "trace_symbol": symbol})


def is_traceable(thing: Any) -> bool:
    """Tell whether an object, or a class, remembers the arguments it was made with."""
    return isinstance(thing, type) and issubclass(thing, Traced) or hasattr(thing, "trace_symbol")
