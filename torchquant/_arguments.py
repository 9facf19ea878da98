"""Check arguments of public functions against their annotations.

The annotation of a parameter alone says which values it takes: `checked` reads it, and raises ConfigError for any other
value, which says what came, what is allowed and, if the expected class knows it, what to do.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from torchquant._shown import UNTOUCHED, first_line, shown
from torchquant.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])
CHECKED_ELEMENTS = 1000
"""Largest number of elements of a collection that are checked."""


@dataclass(frozen=True)
class Bounds:
    """The finite numbers that an annotation allows: at least, above, at most, below another number; None: any.

    >>> fits(Annotated[float, Bounds(0, below=1)], 1.0), described(Annotated[int, Bounds(1)])
    (False, 'a whole number >= 1')
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def allows(self, value: Any) -> bool:
        """Tell whether a number lies within."""
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = {">=": self.least, ">": self.above, "<=": self.most, "<": self.below}
        return " and ".join(f"{sign} {end:g}" for sign, end in ends.items() if end is not None)


Count = Annotated[int, Bounds(1)]
"""A whole number of at least 1."""
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, most=1)]
"""A number from 0 to 1."""


def checked(target: F) -> F:
    """Check the arguments of a function, or of a class's constructor, against their annotations at each call.

    A whole number may not be True or False, a number may not be NaN, a sequence of strings may not be one string.
    Parameters without annotation, or with one that does not resolve, take anything; so does code that is being
    compiled.

    >>> @checked
    ... def wait(seconds: float, why: str | None = None) -> None: ...
    >>> wait("long")
    Traceback (most recent call last):
    torchquant.errors.ConfigError: wait: seconds must be a number, got 'long'
    """
    if isinstance(target, type):
        check_constructor(target)
        return cast(F, target)
    return _checked(target)


def check_constructor(kind: type) -> None:
    """Apply `checked` to a class whose own constructor is not checked yet; for `__init_subclass__`."""
    constructor = kind.__dict__.get("__init__")
    if inspect.isfunction(constructor) and not hasattr(constructor, "__wrapped__"):
        kind.__init__ = _checked(constructor)  # type: ignore[misc]


def explained(function: F) -> F:
    """Apply `checked` to a pure maths function; errors of torch then become errors about arguments that do not fit.

    >>> @explained
    ... def add(x: Tensor, y: Tensor) -> Tensor:
    ...     return x + y
    >>> add(torch.zeros(2), torch.zeros(3))
    Traceback (most recent call last):
    torchquant.errors.ConfigError: add: the arguments do not go together: x a tensor of shape [2] and type float32, \
y a tensor of shape [3] and type float32. The size of tensor a (2) must match the size of tensor b (3) at \
non-singleton dimension 0
    """
    return _checked(function, explains=True)


def _checked(function: F, explains: bool = False) -> F:
    check, is_compiling, untouched = _Check(function), torch.compiler.is_compiling, UNTOUCHED

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return function(*args, **kwargs)
        check(args, kwargs)
        if not explains:
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except untouched:
            raise
        except Exception as error:
            check.explain(args, kwargs, error)
            raise

    # doctest only finds examples of functions that have the globals of their module
    own = types.FunctionType(call.__code__, function.__globals__, function.__name__, None, call.__closure__)
    return cast(F, functools.wraps(function)(own))


_PLAIN = (Tensor, nn.Parameter, bool, int, str, type(None))
"""Types whose values all fit an annotation if one of them does; whole numbers only if below `SAFE`."""
SAFE = 2**62


class _Check:
    """Checks the arguments of one function against its annotations."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function.__name__
        self.parameters: dict[str, Parameter] = {}
        self.in_order: list[Parameter] = []

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ConfigError for the first argument that does not fit its annotation."""
        if not self.parameters:
            self.parameters = _parameters(self.function)
            self.in_order = list(self.parameters.values())
        for parameter, value in zip(self.in_order, args, strict=False):
            kind = type(value)
            if kind not in parameter.plain or kind is int and not -SAFE < value < SAFE:
                self._look_at(parameter, value, args)
        for name, value in kwargs.items():
            if name in self.parameters and (type(value) not in self.parameters[name].plain or type(value) is int):
                self._look_at(self.parameters[name], value, args)

    def _look_at(self, parameter: Parameter, value: Any, args: tuple[Any, ...]) -> None:
        is_nan = isinstance(value, float) and value != value and not _is_open(parameter.hint)
        if value is parameter.default or (fits(parameter.hint, value) and not is_nan):
            is_plain = type(value) in _PLAIN and not _has_bounds(parameter.hint)
            if is_plain and (value is not parameter.default or fits(parameter.hint, value)):
                parameter.plain.add(type(value))
            return
        raise ConfigError(
            f"{self._called(args)}: {parameter.name} must be {described(parameter.hint)}, got {shown(value)}"
            f"{_advice(parameter.hint, value)}"
        )

    def _called(self, args: tuple[Any, ...]) -> str:
        return type(args[0]).__name__ if self.name == "__init__" else self.name

    def explain(self, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> None:
        """Turn an error of torch or Python into a ConfigError that says what came."""
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if any(isinstance(value, Proxy) for value in given.values()):
            return
        came = ", ".join(f"{name} {shown(value)}" for name, value in given.items())
        raise ConfigError(f"{self.name}: the arguments do not go together: {came}. {first_line(error)}") from error


def one_number(value: object, what: str) -> Tensor:
    """Return the value if it is a tensor with one number. Raises ConfigError that begins with `what`."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    raise ConfigError(
        f"{what} must be a tensor with one number: the mean over the samples of a batch; got {shown(value)}"
    )


def number(value: object, what: str) -> float:
    """Return the value as a number. Raises ConfigError that begins with `what`."""
    if _is_number(value) or isinstance(value, Tensor) and value.numel() == 1:
        return float(cast(float, value))
    raise ConfigError(f"{what} must be a number, got {shown(value)}")


class Parameter(NamedTuple):
    """A parameter of a checked function. `plain`: the types that fit, among those whose values are all alike."""

    name: str
    hint: Any
    default: Any
    plain: set[type]


def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Return name -> parameter; parameters that gather `*args` and `**kwargs` end the list."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError:  # a name that only a type checker imports
        hints = {}
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            break
        found[name] = Parameter(name, hints.get(name, Any), parameter.default, set())
    return found


def _bounds(hint: Any) -> list[Bounds]:
    return [extra for extra in get_args(hint)[1:] if isinstance(extra, Bounds)]


def _has_bounds(hint: Any) -> bool:
    return isinstance(hint, Bounds) or any(map(_has_bounds, get_args(hint)))


def _is_open(hint: Any) -> bool:
    return hint is Any or hint is object or isinstance(hint, TypeVar)


def fits(hint: Any, value: object) -> bool:
    """Tell whether a value fits an annotation.

    >>> fits(int, 8), fits(int, True), fits(float, 2**70), fits(Sequence[str], "abc")
    (True, False, False, False)
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(arguments[0], value) and all(bounds.allows(value) for bounds in _bounds(hint))
    if _is_open(hint):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(kind, value) for kind in arguments)
    if origin is type:
        return isinstance(value, type) and (_is_open(arguments[0]) or issubclass(value, arguments[0]))
    if hint in _SIMPLE:
        return _SIMPLE[hint].allows(value)
    kind = hint if origin is None else origin
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False) and kind.__module__ != "collections.abc":
        return True
    return (
        isinstance(value, kind)
        and not (_gathers(kind) and isinstance(value, str | bytes))
        and _elements_fit(kind, arguments, value)
    )


def _gathers(kind: type) -> bool:
    return issubclass(kind, Iterable) and not issubclass(kind, nn.Module | str)


def _elements_fit(kind: Any, arguments: tuple[Any, ...], value: Any) -> bool:
    if kind is collections.abc.Callable:
        return _takes(value, arguments)
    if isinstance(value, Tensor):
        return value.ndim > 0 and (not arguments or fits(arguments[0], value))
    if not arguments or not isinstance(value, Mapping | Sequence | AbstractSet):
        return True
    if len(value) > CHECKED_ELEMENTS:
        return True
    if isinstance(value, Mapping) and len(arguments) == 2:
        return all(fits(arguments[0], k) and fits(arguments[1], v) for k, v in value.items())
    if kind is tuple and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(fits, arguments, value))
    return all(fits(arguments[0], element) for element in value)


def _takes(function: Any, arguments: tuple[Any, ...]) -> bool:
    """Tell whether a function can be called with as many arguments as the annotation says, as far as is known."""
    if not arguments or arguments[0] is Ellipsis:
        return True
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # a function written in C
        return True
    try:
        signature.bind(*arguments[0])
    except TypeError:
        return False
    return True


class Simple(NamedTuple):
    """A kind of value without parts."""

    name: str
    plural: str
    allows: Callable[[Any], bool]


def _is_number(value: object) -> bool:
    if not isinstance(value, Real) or _is_bool(value):
        return False
    return not isinstance(value, Integral) or _is_whole(value)


def _is_whole(value: object) -> bool:
    """Tell whether the value is a whole number that fits into the 64 bits torch takes."""
    return isinstance(value, Integral) and not _is_bool(value) and -(2**63) <= int(value) < 2**63


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ == "bool_"


_SIMPLE: dict[Any, Simple] = {
    type(None): Simple("None", "None", lambda value: value is None),
    bool: Simple("True or False", "True or False", _is_bool),
    int: Simple("a whole number", "whole numbers", _is_whole),
    float: Simple("a number", "numbers", _is_number),
    str: Simple("a string", "strings", lambda value: isinstance(value, str)),
    Tensor: Simple("a tensor", "tensors", lambda value: isinstance(value, Tensor | Proxy)),
    os.PathLike[str]: Simple("a path", "paths", lambda value: isinstance(value, os.PathLike)),
}


def described(hint: Any, plural: bool = False) -> str:
    """Describe an annotation in words.

    >>> described(int | None), described(Sequence[str]), described(Mapping[str, nn.Module])
    ('a whole number or None', 'a sequence of strings', 'a mapping from strings to Modules')
    """
    origin, arguments = get_origin(hint), [a for a in get_args(hint) if a is not Ellipsis]
    if origin is Annotated:
        return " ".join([described(arguments[0], plural), *map(str, _bounds(hint))])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(kind, plural) for kind in arguments))
    if hint in _SIMPLE:
        return _SIMPLE[hint].plural if plural else _SIMPLE[hint].name
    if _is_open(hint):
        return "values" if plural else "any value"
    kind = hint if origin is None else origin
    if kind is collections.abc.Callable:
        takes = "" if not arguments or not isinstance(arguments[0], list) else f" of {len(arguments[0])} arguments"
        return f"{'functions' if plural else 'a function'}{takes}"
    name = kind.__name__
    if origin is type:
        return f"{'classes' if plural else 'a class'} of {described(arguments[0], True)}"
    if isinstance(kind, type) and _gathers(kind):
        name = name.lower()
        if name == "mapping" and len(arguments) == 2:
            name = f"mapping{'s' if plural else ''} from {described(arguments[0], True)} to "
            name += described(arguments[1], True)
            return name if plural else _with_article(name)
        parts = " and ".join(dict.fromkeys(described(a, True) for a in arguments)) if arguments else ""
        name += ("s" if plural else "") + (f" of {parts}" if parts else "")
        return name if plural else _with_article(name)
    return f"{name}s" if plural else _with_article(name)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeioAEIO' or name[:2] == 'RN' else 'a'} {name}"


def _advice(hint: Any, value: object) -> str:
    """Say what to do instead, if it is known: an object instead of its class, or the advice of the expected class."""
    kinds = [kind for kind in (get_args(hint) or (hint,)) if isinstance(kind, type)]
    if isinstance(value, type) and any(issubclass(value, kind) for kind in kinds):
        return f"; give an object: {value.__name__}(...)"
    told = [getattr(kind, "made_by", None) for kind in kinds]
    return "".join(f"; {how}" for how in told if isinstance(how, str))
