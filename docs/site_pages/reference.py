"""The pages of the API reference: every public name, grouped by what a user wants to do."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from torchquant._registry import Registry

TASKS: dict[str, tuple[str, ...]] = {
    "Quantize a model": ("torchquant", "torchquant.plan", "torchquant.graph", "torchquant.models", "torchquant.utils"),
    "Quantizers": ("torchquant.quantizers",),
    "Functions behind quantizers": ("torchquant.quantizers_functional",),
    "Range observers": ("torchquant.range_observers",),
    "Modules and states": ("torchquant.qmodule",),
    "Train": ("torchquant.training",),
    "Round after training": ("torchquant.ptq",),
    "Search schemes and bit widths": ("torchquant.search", "torchquant.search_run"),
    "Analyze": ("torchquant.analysis",),
    "Deploy": ("torchquant.deploy",),
    "Other libraries": ("torchquant.integrations",),
    "Compare schemes": ("torchquant.compare",),
    "Commands from Python": (
        *("torchquant.runs.quantize", "torchquant.runs.ptq", "torchquant.runs.analyze", "torchquant.runs.export"),
        *("torchquant.runs.demo", "torchquant.cli"),
    ),
    "Coming from NNI": ("torchquant.compat.nni",),
    "Coming from AutoQNN": (
        *("torchquant.compat.autoqnn", "torchquant.compat.autoqnn.core", "torchquant.compat.autoqnn.quantizers"),
        *("torchquant.compat.autoqnn.models", "torchquant.compat.autoqnn.datasets"),
    ),
    "Checkpoints of other packages": ("torchquant.compat.checkpoints",),
    "Errors": ("torchquant.errors",),
}
"""Task -> the packages whose public names serve it."""


def pages() -> dict[str, str]:
    """Make the pages of the reference: address in the site -> reStructuredText with a directive for each name."""
    homes = _homes()
    made = {f"reference/{_file(task)}.rst": _page(task, packages, homes) for task, packages in TASKS.items()}
    listed = "\n".join(f"   {_file(task)}" for task in TASKS)
    made["reference/index.rst"] = f"{_title('API reference', '=')}\n.. toctree::\n   :maxdepth: 2\n\n{listed}\n"
    return made


def _homes() -> dict[int, str]:
    """Return the address under which each object is described: the last of several, the top level being first."""
    homes: dict[int, str] = {}
    for package in (package for packages in TASKS.values() for package in packages):
        module = importlib.import_module(package)
        for name in module.__all__:
            homes[id(getattr(module, name))] = f"{package}.{name}"
    return homes


def _page(task: str, packages: tuple[str, ...], homes: dict[int, str]) -> str:
    parts = [_title(task, "=")]
    for package in packages:
        module = importlib.import_module(package)
        parts += [_title(package, "-"), f".. py:currentmodule:: {package}\n"]
        for name in sorted(module.__all__, key=str.lower):
            thing, address = getattr(module, name), f"{package}.{name}"
            if homes[id(thing)] == address:
                parts.append(_directive(thing, address))
            else:
                parts.append(f"``{address}``: :py:obj:`{homes[id(thing)]}`\n")
    return "\n".join(parts)


def _directive(thing: Any, address: str) -> str:
    if inspect.ismodule(thing):
        return f".. automodule:: {address}\n"
    if inspect.isclass(thing):
        return f".. autoclass:: {address}\n   :members:\n"
    if callable(thing):
        return f".. autofunction:: {address}\n"
    return f".. py:data:: {address}\n\n   {_contents(thing)}\n"


def _contents(thing: Any) -> str:
    """Say what a constant holds: the names of a registry or a dictionary, or the value."""
    if not isinstance(thing, Iterable):
        return f"``{thing!r}``"
    kind = f"Registry: {thing.kind}" if isinstance(thing, Registry) else type(thing).__name__
    return f"{kind}. Holds {', '.join(f'``{item}``' for item in thing)}."


def _file(task: str) -> str:
    return task.lower().replace(" ", "_")


def _title(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"
