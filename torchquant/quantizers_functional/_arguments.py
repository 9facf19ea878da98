"""Constructors that refuse an argument of a wrong type where it is given, with what is allowed."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

from torchquant.errors import ConfigError

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a name", types.NoneType: "None"}


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, kinds: tuple[Any, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """`init`, after which, or instead of whose raw error, an argument that is not of its annotated type is refused."""
    signature = inspect.signature(init)

    def refuse_wrong_types(owner: object, *args: Any, **kwargs: Any) -> None:
        hints = get_type_hints(init)
        for name, value in signature.bind(owner, *args, **kwargs).arguments.items():
            kinds = _kinds(hints.get(name))
            if all(kind in _WORDS for kind in kinds) and not _fits(value, kinds):
                allowed = " or ".join(words for kind, words in _WORDS.items() if kind in kinds)
                shown = repr(value) if len(repr(value)) <= 80 else f"a {type(value).__name__}"
                raise ConfigError(f"{name} of {type(owner).__name__} must be {allowed}, got {shown}")

    @functools.wraps(init)
    def checked(self: object, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            if not isinstance(error, ConfigError):
                try:
                    signature.bind(self, *args, **kwargs)
                except TypeError:
                    raise error from None
                refuse_wrong_types(self, *args, **kwargs)
            raise
        refuse_wrong_types(self, *args, **kwargs)

    return checked


class ChecksArguments:
    """A base whose subclasses check the plain types of their constructor's arguments: bool, int, float, str, None.

    A rule of the constructor itself speaks first; what it lets pass or trips over is refused here with ConfigError.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _checked(cls.__dict__["__init__"])  # type: ignore[method-assign]
