"""Describe how a module is called: which arguments are tensors, and the values of the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.fingerprint import fingerprint

PLAIN = (bool, int, float, str, bytes, type(None))


class _TensorHere:
    """The only instance stands for a tensor in a pattern."""

    def __repr__(self) -> str:
        return "<tensor>"

    def __reduce__(self) -> str:
        return "TENSOR"


TENSOR = _TensorHere()


@dataclass(frozen=True)
class Signature:
    """The arguments of a forward: names and defaults of single arguments, and the names of *args and **kwargs."""

    names: tuple[str, ...]
    defaults: tuple[Any, ...]  # inspect.Parameter.empty without a default
    keyword_only: frozenset[str] = frozenset()
    rest: str = ""
    more: str = ""

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> Signature:
        """Read the signature of the forward of a class, without `self`."""
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return cls(
            tuple(p.name for p in single),
            tuple(p.default for p in single),
            frozenset(p.name for p in single if p.kind is p.KEYWORD_ONLY),
            next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), ""),
            next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), ""),
        )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return the values of all arguments, then those of *args and **kwargs; None for a call that does not fit."""
        places = [name for name in self.names if name not in self.keyword_only]
        if len(args) > len(places) and not self.rest:
            return None
        values = list(args[: len(places)])
        left = dict(kwargs)
        for name, default in zip(self.names[len(values) :], self.defaults[len(values) :], strict=True):
            value = left.pop(name, default)
            if value is inspect.Parameter.empty:
                return None
            values.append(value)
        if left and not self.more:
            return None
        return (*values, tuple(args[len(places) :]), left)

    def unbind(self, values: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments and keyword arguments for these values, without defaults."""
        *single, rest, more = values
        args: list[Any] = []
        keywords = {}
        for name, default, value in zip(self.names, self.defaults, single, strict=True):
            by_place = name not in self.keyword_only and (rest or default is inspect.Parameter.empty)
            if by_place:
                args.append(value)
            elif value is not default:
                keywords[name] = value
        return [*args, *rest], {**keywords, **more}

    def default_pattern(self) -> tuple[Any, ...] | None:
        """Return tensors for arguments without default, and the defaults of others; None if there is no tensor."""
        empty = inspect.Parameter.empty
        values = tuple(TENSOR if default is empty else default for default in self.defaults)
        return (*values, (), {}) if TENSOR in values else None


def pattern_of(values: Any) -> Any:
    """Replace every tensor in nested tuples, lists and dictionaries by TENSOR."""
    if isinstance(values, Tensor):
        return TENSOR
    if type(values) in (tuple, list):
        return type(values)([pattern_of(v) for v in values])
    if type(values) is dict:
        return {key: pattern_of(v) for key, v in values.items()}
    return values


def fits(pattern: Any, values: Any) -> bool:
    """Tell whether `pattern_of(values)` equals the pattern, as far as is possible without tensors."""
    if pattern is TENSOR:
        return isinstance(values, Tensor)
    if type(pattern) in (tuple, list):
        return type(values) is type(pattern) and len(values) == len(pattern) and all(map(fits, pattern, values))
    if type(pattern) is dict:
        return (
            type(values) is dict and list(values) == list(pattern) and all(fits(pattern[k], values[k]) for k in pattern)
        )
    if pattern is values:
        return True
    if isinstance(pattern, PLAIN):
        return type(values) is type(pattern) and bool(pattern == values)
    return not isinstance(values, Tensor) and bool(fingerprint(pattern) == fingerprint(values))


def leaves(pattern: Any, values: Any) -> Iterator[Any]:
    """Yield the tensors in values, in the order of the pattern."""
    if pattern is TENSOR:
        yield values
    elif type(pattern) in (tuple, list):
        for part, value in zip(pattern, values, strict=True):
            yield from leaves(part, value)
    elif type(pattern) is dict:
        for key in pattern:
            yield from leaves(pattern[key], values[key])


def filled(pattern: Any, tensors: Iterator[Any]) -> Any:
    """Fill tensors into a pattern."""
    if pattern is TENSOR:
        return next(tensors)
    if type(pattern) in (tuple, list):
        return type(pattern)([filled(part, tensors) for part in pattern])
    if type(pattern) is dict:
        return {key: filled(part, tensors) for key, part in pattern.items()}
    return pattern


def names_of(signature: Signature, pattern: tuple[Any, ...]) -> list[str]:
    """Return a name for every tensor of a pattern: that of its argument, numbered if an argument holds several."""
    found = []
    for name, part in zip((*signature.names, signature.rest, signature.more), pattern, strict=True):
        if part is TENSOR:
            found.append(name)
        elif name == signature.more and isinstance(part, dict) and all(v is TENSOR for v in part.values()):
            found += list(part)
        else:
            n = sum(1 for _ in leaves(part, part))
            found += [f"{name}_{i}" for i in range(n)]
    return found


_WITH_TEXT = (bool, int, float, str, type(None))


def is_default_call(module: nn.Module, pattern: tuple[Any, ...]) -> bool:
    """Tell whether a pattern is the default call of a module, which is assumed without an example."""
    default = Signature.of(type(module).forward).default_pattern()
    texts = [calls_to_data({"": call}) for call in (pattern, default)]
    return default is not None and bool(texts[0]) and repr(texts[0]) == repr(texts[1])


def calls_to_data(patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Convert path -> call of the module to plain data, without calls whose arguments have no text form.

    >>> calls_to_data({"head": (TENSOR, 2.0, {"mode": [None]}), "other": (object(),)})
    {'head': {'tuple': [{'tensor': True}, 2.0, {'dict': {'mode': [None]}}]}}
    """
    found = {}
    for path, pattern in patterns.items():
        with suppress(_NoTextError):
            found[path] = _to_data(pattern)
    return found


def calls_from_data(data: Any, where: str) -> dict[str, tuple[Any, ...]]:
    """Read the result of `calls_to_data`; `where` names it in messages. Raises ConfigError."""
    if not isinstance(data, dict) or not all(isinstance(path, str) for path in data):
        raise ConfigError(f"{where} must be a mapping of paths to calls, got {shown(data)}")
    found = {path: _from_data(call, f"{where}, {path!r}") for path, call in data.items()}
    for path, call in found.items():
        if not (
            isinstance(call, tuple) and len(call) >= 2 and isinstance(call[-2], tuple) and isinstance(call[-1], dict)
        ):
            raise ConfigError(
                f"{where}, {path!r}: a call must be a tuple of every argument of the forward, then a tuple and a dict "
                f"of the values of *args and **kwargs; got {shown(call)}"
            )
    return found


class _NoTextError(Exception):
    """Raised for an argument that no file can hold."""


def _to_data(pattern: Any) -> Any:
    if pattern is TENSOR:
        return {"tensor": True}
    if type(pattern) is tuple:
        return {"tuple": [_to_data(part) for part in pattern]}
    if type(pattern) is list:
        return [_to_data(part) for part in pattern]
    if type(pattern) is dict and all(type(key) is str for key in pattern):
        return {"dict": {key: _to_data(part) for key, part in pattern.items()}}
    if type(pattern) in _WITH_TEXT:
        return pattern
    raise _NoTextError


def _from_data(data: Any, where: str) -> Any:
    if isinstance(data, list):
        return [_from_data(part, where) for part in data]
    if not isinstance(data, dict):
        return data
    match data:
        case {"tensor": True, **rest} if not rest:
            return TENSOR
        case {"tuple": list(parts), **rest} if not rest:
            return tuple(_from_data(part, where) for part in parts)
        case {"dict": dict(parts), **rest} if not rest:
            return {key: _from_data(part, where) for key, part in parts.items()}
    raise ConfigError(f"{where}: expected {{tensor: true}}, {{tuple: [...]}} or {{dict: {{...}}}}, got {shown(data)}")


def arguments_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split an example into arguments and keyword arguments."""
    if isinstance(example_inputs, dict) or hasattr(example_inputs, "keys"):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}
