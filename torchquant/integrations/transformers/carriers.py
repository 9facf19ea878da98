"""Places in a float model for what a checkpoint has beside it, while transformers loads tensors by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError, require

EXTRA_STATE = "_extra_state"
Entries = Mapping[str, Tensor]


def entries_of(files: Sequence[str]) -> dict[str, Tensor]:
    """Return the names of all tensors in the files, each with a tensor on the meta device of its shape and type."""
    safetensors = require("safetensors", "transformers")
    if not files or not all(Path(file).suffix == ".safetensors" for file in files):
        raise ConfigError(f"a model that torchquant saved is in .safetensors files, got {', '.join(files) or 'none'}")
    found: dict[str, Tensor] = {}
    for file in files:
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                found[name] = torch.empty(part.get_shape(), dtype=_dtype(part), device="meta")
    return found


def _dtype(part: Any) -> torch.dtype:
    """Return the type of a tensor in a file, of which as little as possible is read."""
    shape = part.get_shape()
    return part[:1].dtype if shape and shape[0] else part[...].dtype


class Carriers:
    """Gives the float model a parameter or buffer for each entry that it does not have, all on the meta device.

    The float weight whose name codes have is replaced by them; `types`: the type of each. `take()` undoes this, and
    returns what was loaded; transformers' initialization of what no file has calls it first: it reads weights' shapes.
    """

    def __init__(self, model: nn.Module, entries: Entries, types: Mapping[str, torch.dtype]) -> None:
        self._added: list[tuple[nn.Module, str]] = []
        self._replaced: list[tuple[str, nn.Module, str, Tensor]] = []
        self._types = types
        self._names: list[tuple[str, nn.Module, str]] = []
        self._found: dict[str, Tensor] | None = None
        own = model.state_dict(keep_vars=True)
        for name, entry in entries.items():
            held = own.get(name)
            path, _, leaf = name.rpartition(".")
            if held is None:
                self._add(name, self._owner(model, path), leaf, entry)
            elif (held.shape, held.is_floating_point()) != (entry.shape, entry.is_floating_point()):
                owner = model.get_submodule(path)
                self._replaced.append((name, owner, leaf, held))
                owner._parameters[leaf] = nn.Parameter(entry, requires_grad=False)
        initialize: Any = model._initialize_missing_keys

        def take_first(*args: Any, **options: Any) -> None:
            del model.__dict__["_initialize_missing_keys"]
            self.take()
            initialize(*args, **options)

        model.__dict__["_initialize_missing_keys"] = take_first

    def _owner(self, model: nn.Module, path: str) -> nn.Module:
        module = model
        for name in path.split(".") if path else ():
            if name not in module._modules:
                module._modules[name] = nn.Module()
                self._added.append((module, name))
            child = module._modules[name]
            assert child is not None
            module = child
        return module

    def _add(self, name: str, owner: nn.Module, leaf: str, entry: Tensor) -> None:
        owner._buffers[leaf] = entry
        self._names.append((name, owner, leaf))
        if leaf == EXTRA_STATE:
            owner.__dict__["set_extra_state"] = partial(owner._buffers.__setitem__, leaf)

    def take(self) -> dict[str, Tensor]:
        """Remove the places and return their tensors; codes leave a float weight without values."""
        if self._found is not None:
            return self._found
        found = self._found = {}
        for name, owner, leaf in self._names:
            found[name] = getattr(owner, leaf)
            del owner._buffers[leaf]
            owner.__dict__.pop("set_extra_state", None)
        for name, owner, leaf, former in self._replaced:
            codes = owner._parameters[leaf]
            assert codes is not None
            found[name] = codes.data
            weight: Any = nn.Parameter(torch.empty(former.shape, dtype=self._types[name], device=codes.device))
            weight._is_hf_initialized = True
            owner._parameters[leaf] = weight
        for owner, name in reversed(self._added):
            del owner._modules[name]
        return found
