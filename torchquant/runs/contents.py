"""Identify the files of a run by their contents, so that a file changed under the same name is noticed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType

from torch import nn

from torchquant._files import digest_of
from torchquant._user_code import is_installed
from torchquant.errors import ConfigError


def contents_of(paths: Iterable[str | None], nets: Iterable[nn.Module] = (), model: str = "") -> dict[str, str]:
    """Compute name -> sha256 of the files and folders, and of the Python files that define the networks.

    Installed packages, including torchquant, are left out. `model`: "file.py:function" or
    "package.module:function" that built a network.
    """
    found = {path: digest_of(Path(path)) for path in paths if path is not None}
    starts = [kind.__module__ for net in nets for module in net.modules() for kind in type(module).__mro__]
    place = model.rpartition(":")[0]
    builder = f"torchquant_model_{Path(place).stem}" if place.endswith(".py") else place
    for label, file in sorted(_own_files([*starts, builder])):
        found[label] = digest_of(file)
    return found


def pinned(wanted: dict[str, str] | None, found: dict[str, str]) -> dict[str, str]:
    """Return the contents that were found; raises ConfigError where the settings ask for others."""
    if wanted is not None and (changed := changed_contents(wanted, found)):
        raise ConfigError(
            f"{', '.join(changed)} changed since the settings were written; leave `contents` out of the settings"
        )
    return found


def changed_contents(known: dict[str, str], ours: dict[str, str]) -> list[str]:
    """Names whose contents differ, or that only one of the two has."""
    return [name for name in {**ours, **known} if known.get(name) != ours.get(name)]


def _own_files(starts: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(label, file) of the given modules that are not installed packages, and of the modules they import names from."""
    waiting, seen = list(dict.fromkeys(starts)), set()
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if name in seen or module is None or file is None or is_installed(Path(file)):
            continue
        if not Path(file).is_file():
            continue  # torch.ops and torch.classes name files that do not exist
        seen.add(name)
        yield (Path(file).name if name.startswith("torchquant_") else f"{name.replace('.', '/')}.py"), Path(file)
        waiting += [
            value.__name__ if isinstance(value, ModuleType) else value.__module__
            for value in list(vars(module).values())
            if isinstance(value, ModuleType | FunctionType) or inspect.isclass(value)
        ]
