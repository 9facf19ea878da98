"""Format values and errors for messages, in brief, whatever they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from reprlib import Repr
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from torchquant._user_code import line_of
from torchquant.errors import ConfigError, TorchQuantError

SHOWN = 100
"""Largest number of characters of a value in a message."""
MANY = 12
"""Largest number of words of a list in a message."""
LINE = 300
"""Largest number of characters of another message in a message."""
UNTOUCHED = (TorchQuantError, TraceError, torch.OutOfMemoryError)
"""Exceptions that pass through unchanged: our own, those that tracing needs, and out of memory."""
_OF_MODELS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _Brief(Repr):
    """Shortens every part. Tensors, modules, classes, functions and objects without a repr are shown by name."""

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            return f"a tensor of shape {list(x.shape)} and type {str(x.dtype).partition('.')[2]}"
        if isinstance(x, type):
            return f"the class {x.__name__}"
        if isinstance(x, int) and x.bit_length() > 64:
            return f"a whole number of {x.bit_length()} bits"
        if inspect.isroutine(x):
            return f"the function {x.__name__}"
        if isinstance(x, nn.Module) or getattr(type(x), "__repr__", None) is object.__repr__:
            return f"an object of the class {type(x).__name__}"
        return super().repr1(x, level)


_brief = _Brief()
_brief.maxstring = _brief.maxother = 60
_brief.maxlevel = 3


def shown(value: object) -> str:
    """Format a value for a message: its repr, shortened; tensors by shape, modules, functions and classes by name.

    >>> shown("affine:8"), shown(torch.zeros(2, 3)), shown([nn.ReLU, abs])
    ("'affine:8'", 'a tensor of shape [2, 3] and type float32', '[the class ReLU, the function abs]')
    """
    try:
        text = _brief.repr(value)
    except Exception:  # a repr may fail in any way
        text = f"an object of the class {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


@contextmanager
def running(model: object, what: str, inputs: object) -> Iterator[None]:
    """Turn an error of a model into a ConfigError that names the model and the inputs and repeats the error.

    >>> with running(nn.Linear(4, 2), "the example", 7):
    ...     nn.Linear(4, 2)(7)
    Traceback (most recent call last):
    torchquant.errors.ConfigError: Linear does not run on the example (7): linear(): argument 'input' (position 1) \
must be Tensor, not int. A tensor, a tuple of arguments or a dictionary of keyword arguments is given to its forward
    """
    try:
        yield
    except UNTOUCHED:
        raise
    except _OF_MODELS as error:
        raise ConfigError(
            f"{type(model).__name__} does not run on {what} ({shown(inputs)}): {first_line(error)}{line_of(error)}. A "
            "tensor, a tuple of arguments or a dictionary of keyword arguments is given to its forward"
        ) from error


def some(words: Sequence[str], most: int = MANY, separator: str = ", ") -> str:
    """Join the first `most` words with a separator, and say how many more there are.

    >>> some(["a", "b"]), some(list("abcdefghijklmn")), some(["a", "b", "c"], 1, "; ")
    ('a, b', 'a, b, c, d, e, f, g, h, i, j, k, l, and 2 more', 'a; and 2 more')
    """
    more = [f"and {len(words) - most} more"] if len(words) > most else []
    return separator.join([*words[:most], *more])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened; with the kind of error if the message alone is unclear.

    >>> first_line(ValueError("no\\nyes")), first_line(KeyError("a")), first_line(AssertionError())
    ('no', "KeyError: 'a'", 'AssertionError')
    """
    try:
        text = next(iter(str(error).strip().splitlines()), "")
    except Exception:  # a message may fail as a repr may
        text = ""
    if not text or isinstance(error, LookupError | AttributeError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= LINE else f"{text[: LINE - 3]}..."
