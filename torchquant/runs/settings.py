"""What a run is asked for: settings of their type and in their range, and what their words stand for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from torchquant._arguments import described, fits
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.plan import RULE_SETS, QuantPlan, read_yaml
from torchquant.runs.data import DATA

MAX_SEED = 2**32 - 1


def check_types(instance: Any) -> None:
    """Raise ConfigError for a field of a data class whose value is not of the field's type, by name."""
    for name, hint in get_type_hints(type(instance)).items():
        value = getattr(instance, name, None)
        if name in instance.__dataclass_fields__ and not fits(hint, value):
            raise ConfigError(f"{name} must be {described(hint)}, got {shown(value)}")


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


def read_rules(rules: str) -> Any:
    """A ready set by name; or what a YAML file holds: a list of rules, or a plan. Raises ConfigError."""
    if rules in RULE_SETS:
        return rules
    path = Path(rules)
    if not path.is_file():
        raise ConfigError(f"rules must be one of {', '.join(RULE_SETS)}, or a YAML file; there is no file {rules!r}")
    found = read_yaml(path)
    return QuantPlan.load(path) if isinstance(found, dict) else found


def files_of(data: str, rules: str | None) -> Iterator[str]:
    """Those of the two that are files or folders, not names."""
    if data not in DATA:
        yield data
    if rules is not None and rules not in RULE_SETS:
        yield rules
