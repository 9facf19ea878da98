"""Every error that torchquant raises on purpose.

TorchQuantError
├── ConfigError              also a ValueError: an argument is out of its allowed set
│   ├── UnknownNameError     a name nobody registered
│   └── NameClashError       a name registered twice
├── UnsupportedPatternError  also a TypeError: layers no QWrapper knows
├── UnobservedRangeError     also a RuntimeError: asked to quantize before seeing data
├── NonFiniteError           also a ValueError: NaN or Inf where only numbers make sense
├── NoAffineViewError        also a TypeError: a non-uniform format was asked for a scale
├── NoCodesError             also a TypeError: a quantizer that defines no integer codes
├── RoundingLostError       also a ValueError: a weight that does not quantize to the levels given for it
├── ExportError              also a RuntimeError: a model that cannot be written in the asked form
├── MissingDependencyError   also an ImportError: an optional package is not installed
└── LawViolation             also an AssertionError: `check_quantizer` found a broken law

StaysFloatWarning, a UserWarning: `quantize` leaves more of a model float than was asked for
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "ConfigError",
    "ExportError",
    "LawViolation",
    "MissingDependencyError",
    "NameClashError",
    "NoAffineViewError",
    "NoCodesError",
    "NonFiniteError",
    "RoundingLostError",
    "StaysFloatWarning",
    "TorchQuantError",
    "UnknownNameError",
    "UnobservedRangeError",
    "UnsupportedPatternError",
]


LONGEST = 1000
"""Largest number of characters of a message; the middle of a longer one is left out."""


class TorchQuantError(Exception):
    """Base of every error that torchquant raises on purpose. Its message is shortened, however long the values are.

    >>> len(str(TorchQuantError("got " + "x" * 5000))) <= LONGEST
    True
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_shortened(arg) if isinstance(arg, str) else arg for arg in args))


def _shortened(message: str) -> str:
    if len(message) <= LONGEST:
        return message
    head, tail = LONGEST * 6 // 10, LONGEST * 3 // 10
    return f"{message[:head]} ... ({len(message) - head - tail} characters left out) ... {message[-tail:]}"


class ConfigError(TorchQuantError, ValueError):
    """An argument is outside what is allowed; the message says what came and what is allowed."""


class UnknownNameError(ConfigError):
    """A name is not registered; the message lists the known names."""


class NameClashError(ConfigError):
    """A name is already registered for something else."""


class UnsupportedPatternError(TorchQuantError, TypeError):
    """A sequence of layers is not one that QWrapper can run."""


class UnobservedRangeError(TorchQuantError, RuntimeError):
    """A quantizer was asked to quantize before it had seen any data."""


class NonFiniteError(TorchQuantError, ValueError):
    """NaN or Inf arrived where only finite numbers make sense."""


class NoAffineViewError(TorchQuantError, TypeError):
    """A non-uniform format was asked for the step and zero point of a uniform one."""


class NoCodesError(TorchQuantError, TypeError):
    """A quantizer that defines no integer codes was asked for them."""


class RoundingLostError(TorchQuantError, ValueError):
    """Levels were given for a weight, and no weight was found that its quantizer makes them of."""


class ExportError(TorchQuantError, RuntimeError):
    """A model cannot be written in the requested form."""


class MissingDependencyError(TorchQuantError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


class LawViolation(TorchQuantError, AssertionError):  # noqa: N818 - says what it is
    """A quantizer or an observer breaks one of the laws that `check_quantizer` and `check_observer` test.

    `law` is the name of the law, `detail` the values that break it.
    """

    def __init__(self, law: str, detail: str) -> None:
        super().__init__(f"law '{law}' does not hold: {detail}")
        self.law = law
        self.detail = detail


class StaysFloatWarning(UserWarning):
    """More of a model stays float than its rules ask for; `quantize(..., strict=True)` raises instead."""


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra of torchquant installs it.

    >>> require("math", "report").pi > 3
    True
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if error.name is not None and not f"{package}.".startswith(f"{error.name}."):
            raise
        raise MissingDependencyError(
            f"this needs the package '{package.partition('.')[0]}', which is not installed; "
            f"run: pip install 'torchquant[{extra}]'"
        ) from error


MOST = 300
"""Largest number of characters of another library's message in a message."""


def one_line(error: object) -> str:
    """Return the text of an error of another library, in one line of bounded length.

    >>> one_line(ValueError("a\\n  b"))
    'a b'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."
