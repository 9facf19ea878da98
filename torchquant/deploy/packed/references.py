"""Build models by the name of a function."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from torchquant._files import run_python_file
from torchquant._user_code import failure, user_frame
from torchquant.errors import ConfigError, TorchQuantError

FORM = "a model of your own is path/to/file.py:function"


def model_of(reference: str, **arguments: Any) -> nn.Module:
    """Call "package.module:function" or "path/to/file.py:function" and return the model it builds.

    This imports the module or runs the file. Raises ConfigError.

    >>> model_of("torch.nn:Linear", in_features=2, out_features=3)
    Linear(in_features=2, out_features=3, bias=True)
    """
    place, function = split_reference(reference)
    module = _module(place)
    build = getattr(module, function, None)
    if not callable(build):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        some = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise ConfigError(f"{place} has no function '{function}'; it has {some or 'none'}")
    try:
        made = build(**arguments)
    except TorchQuantError:
        raise
    except Exception as error:
        raise ConfigError(failure(error, reference)) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{reference} must return a model (torch.nn.Module), got {type(made).__name__}")
    return made


def split_reference(reference: str) -> tuple[str, str]:
    """Split a reference into (module or file, function). Raises ConfigError for another form."""
    place, _, function = reference.rpartition(":") if isinstance(reference, str) else ("", "", "")
    if not place or not function.isidentifier():
        raise ConfigError(f"expected 'package.module:function' or 'path/to/file.py:function', got {reference!r}")
    return place, function


def _module(place: str) -> ModuleType:
    is_file = place.endswith(".py") or not all(part.isidentifier() for part in place.split("."))
    if is_file and not Path(place).is_file():
        raise ConfigError(f"there is no file {place}; {FORM}")
    try:
        return run_python_file(Path(place), "model") if is_file else importlib.import_module(place)
    except ImportError as error:
        if user_frame(error) is not None:
            raise ConfigError(failure(error, place)) from error
        raise ConfigError(f"{error}; {FORM}, a model in a package is package.module:function") from error
    except (TorchQuantError, AssertionError):
        raise
    except Exception as error:
        raise ConfigError(failure(error, place)) from error
