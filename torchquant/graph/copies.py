"""Copy models with all attributes of their modules, also to get throw-away copies for tracing and trials."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from torchquant.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model, shared: Iterable[object] = ()) -> Model:
    """Make a deep copy; tensors with a history, such as a loss kept on a module, are copied without it.

    `copy.deepcopy` refuses such tensors. `shared`: objects that the copy shares with the model.
    Raises ConfigError that names the module whose attribute cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in _tensors_with_history(model)}
    memo |= {id(value): value for value in shared}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be copied ({_culprit(model)}: {error}). Delete the attribute first, "
            "or give its class a __deepcopy__"
        ) from error


def _tensors_with_history(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in vars(module).values():
            yield from (t for t in _tensors_anywhere(value, depth=4) if t.grad_fn is not None)


def _tensors_anywhere(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_anywhere(part, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for part in value:
            yield from _tensors_anywhere(part, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from _tensors_anywhere(vars(value), depth - 1)


def _culprit(model: nn.Module) -> str:
    """Name the module and its attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            try:
                copy.deepcopy(value, {id(t): t for t in _tensors_anywhere(value, depth=4)})
            except Exception:  # an object of the user may raise anything
                return f"attribute '{name}' of {path or 'the model'}"
    return "one of its attributes"
