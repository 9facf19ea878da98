"""Describe a Python value as plain data that can be compared later, copied and pickled."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

ATOMS = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.memory_format)
MAX_DEPTH = 5
MAX_PARTS = 5000
ABSENT = "absent"
"""The fingerprint of an attribute that an object has only through its class, such as a method."""


def fingerprint(value: Any) -> Any:
    """Make plain data that differ for two values if Python code that reads them may take another path.

    Tensors and modules count only as such: a graph reads their contents when it runs. Objects are described `MAX_DEPTH`
    deep.
    """
    return _print_of(value, MAX_DEPTH, frozenset(), [MAX_PARTS])


def _print_of(value: Any, depth: int, seen: frozenset[int], left: list[int]) -> Any:
    kind = _name(type(value))
    if isinstance(value, ATOMS):
        return kind, "nan" if value != value else value
    left[0] -= 1
    for opaque in (fx.Proxy, nn.Module, Tensor):
        if isinstance(value, opaque):
            return opaque.__name__
    if depth == 0 or left[0] < 0 or id(value) in seen:
        return kind, "..."
    seen |= {id(value)}

    def below(part: Any) -> Any:
        return _print_of(part, depth - 1, seen, left)

    if isinstance(value, types.FunctionType):
        code = value.__code__
        return kind, _name(value), code.co_filename, code.co_firstlineno, below(value.__defaults__)
    if isinstance(value, types.MethodType):
        return kind, _name(value.__func__), _name(type(value.__self__))
    if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        return kind, _name(value)
    if isinstance(value, functools.partial):
        return kind, below(value.func), below(value.args), below(value.keywords)
    if isinstance(value, Mapping):
        return kind, tuple((below(k), below(v)) for k, v in value.items())
    if isinstance(value, tuple | list):
        return kind, tuple(below(v) for v in value)
    if isinstance(value, set | frozenset):
        return kind, frozenset(below(v) for v in value)
    if hasattr(value, "__dict__"):
        return kind, tuple((name, below(v)) for name, v in vars(value).items())
    return kind


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"
