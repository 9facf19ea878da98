"""Settings are of their type and in their range, or an error says which is not."""

from __future__ import annotations

import math
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from torchquant._shown import shown
from torchquant.errors import ConfigError

WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "True or False", dict: "a dictionary"}
MAX_SEED = 2**32 - 1


def check_types(instance: Any) -> None:
    """Raise ConfigError for a field of a data class whose value is not of the field's type, by name.

    Of strings, numbers, truth values, None and dictionaries; a whole number is a number too. What is inside a
    dictionary is not looked at.
    """
    for name, hint in get_type_hints(type(instance)).items():
        kinds = [get_origin(part) or part for part in (get_args(hint) if _is_union(hint) else (hint,))]
        value = getattr(instance, name, None)
        if name in instance.__dataclass_fields__ and not any(_fits(value, kind) for kind in kinds):
            words = " or ".join(WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
            raise ConfigError(f"{name} must be {words.replace('NoneType', 'None')}, got {shown(value)}")


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_at_least(instance: Any, **least: int) -> None:
    """Raise ConfigError for a field below its least value.

    >>> from types import SimpleNamespace
    >>> check_at_least(SimpleNamespace(epochs=0), epochs=1)
    Traceback (most recent call last):
    torchquant.errors.ConfigError: epochs must be at least 1, got 0
    """
    for name, number in least.items():
        if getattr(instance, name) < number:
            raise ConfigError(f"{name} must be at least {number}, got {getattr(instance, name)}")


def check_above_zero(instance: Any, *names: str) -> None:
    """Raise ConfigError for a field that is neither None nor a finite number above 0."""
    for name in names:
        value = getattr(instance, name)
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigError(f"{name} must be above 0 and finite, got {value}")


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed that numpy or torch would not take."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be 0..{MAX_SEED}, got {seed}")
