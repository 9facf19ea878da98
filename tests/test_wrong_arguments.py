"""The public API, walked: every parameter of every public callable is fed wrong types and values.

Either the call works or it raises an error of torchquant that says what came, in a message of a bounded length. Never
an AttributeError, a KeyError, an error of torch; never a hang.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from tests import public_calls
from tests.public_calls import CALLS, NOT_CALLED
from torchquant._shown import first_line, shown
from torchquant.errors import TorchQuantError

LONGEST = 1000
"""Characters of a message."""
SECONDS = 20
ADDRESSES = tuple(dict.fromkeys((*CALLS, *NOT_CALLED)))


class Strange:
    """Of no kind that anything takes."""


def _nested() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a word": lambda: "nonsense",
    "an empty string": lambda: "",
    "a long word": lambda: "x" * 5000,
    "a spec of 5,000 digits": lambda: "affine:" + "9" * 5000,
    "bytes": lambda: b"nonsense",
    "3.5": lambda: 3.5,
    "0": lambda: 0,
    "-1": lambda: -1,
    "-7.5": lambda: -7.5,
    "True": lambda: True,
    "NaN": lambda: float("nan"),
    "Inf": lambda: float("inf"),
    "a large number": lambda: 10**5000,
    "a number of 63 bits": lambda: 2**62,
    "[]": list,
    "a list": lambda: [Strange()],
    "a list in itself": _nested,
    "a tuple": lambda: (1, "two", None),
    "{}": dict,
    "a dictionary": lambda: {"nonsense": Strange()},
    "an object": Strange,
    "a class": lambda: Strange,
    "a function": lambda: lambda *args, **kwargs: Strange(),
    "a tensor of NaN": lambda: torch.tensor(float("nan")),
    "a whole tensor": lambda: torch.tensor([1, 2, 3]),
    "an empty tensor": lambda: torch.zeros(0),
    "a tensor of another shape": lambda: torch.ones(2, 3, 5, 7),
    "a complex tensor": lambda: torch.zeros(8, 4, dtype=torch.complex64),
    "a module": lambda: nn.BatchNorm3d(17),
    "a quantizer": lambda: public_calls.q("esb:4,k=1"),
}
FEW = {
    *("None", "an empty string", "bytes", "NaN", "-1", "a large number", "{}", "a tuple", "an object", "a function"),
    *("a tensor of another shape", "a complex tensor", "a list", "a number of 63 bits"),
}
"""What those are fed whose calls take long."""
SLOW = (
    *("torchquant.deploy", "torchquant.models", "torchquant.search", "torchquant.training"),
    "torchquant.quantizers._laws",
)
OF_NO_END = {
    "steps",
    "n_batches",
    "num_parameters",
    "epochs",
    "steps_per_epoch",
    "samples",
    "iterations",
    "draws",
    "patience",
    "points",
    "n_steps",
}
"""Counts that may be as large as one likes, and take so long."""


SOMETIMES = ("export_qonnx", "runtime_exact", "to_integer", "CostModel", "measure_latency", "FusedMobileNetV2")
"""What does its whole work on most of what it is fed, and shares its checks with others."""


def entries() -> list[tuple[str, str]]:
    return [(address, name) for address in CALLS for name in CALLS[address]]


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def call(function: Any, arguments: dict[str, Any]) -> None:
    """Call it, and go through what it gives if it does its work only then."""
    result = function(**arguments)
    if isinstance(result, contextlib.AbstractContextManager) and not isinstance(result, nn.Module):
        with result:
            pass
    elif inspect.isgenerator(result):
        list(result)


def complaint(function: Any, arguments: dict[str, Any], wrong: Any = None) -> str | None:
    """What is wrong with how the call answers, one argument being `wrong`; None if nothing is."""
    try:
        with limited(SECONDS), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            call(function, arguments)
    except TorchQuantError as error:
        if len(str(error)) > LONGEST:
            return f"a message of {len(str(error))} characters: {str(error)[:200]}"
        return None if shows(str(error), wrong) else f"does not say what came: {str(error)[:200]}"
    except OSError as error:  # a name that the disk does not take; Python's message says so
        return None if error.filename is not None else f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {first_line(error)[:200]}"
    return None


def shows(message: str, value: Any) -> bool:
    """Whether a message says what came: a word or number itself; of tensors, objects and functions what they are."""
    if isinstance(value, str | bytes | float | int):
        kind = type(value).__name__
        return value in ("", 10**5000) or any(word in message for word in (shown(value), str(value)[:50], kind))
    if isinstance(value, NoneType | nn.Module | list | tuple | dict):
        return True
    return any(word in message for word in ("got", "tensor", "empty", shown(value)))


def hints_of(function: Any) -> dict[str, Any]:
    return get_type_hints(function.__init__ if isinstance(function, type) else function)


def fed(function: Any, parameter: str) -> Iterator[tuple[str, Any]]:
    """(what, value) that a parameter is fed: not its default.

    A module or class given for a function may raise what it likes.
    """
    is_function = "Callable" in str(hints_of(function).get(parameter))
    has_none = inspect.signature(function).parameters[parameter].default is None
    for what, make in WRONG.items():
        if has_none and what == "None":
            continue
        if what in ("a large number", "a number of 63 bits") and parameter in OF_NO_END:
            continue
        if (function.__module__.startswith(SLOW) and what not in FEW) or (
            is_function and what in ("a module", "a quantizer", "a class")
        ):
            continue
        yield what, make()


@pytest.fixture(autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path() == public_calls.FOLDER:
        public_calls.FOLDER = tmp_path_factory.mktemp("files")
    monkeypatch.chdir(tmp_path)


def found(address: str, name: str) -> Any:
    return getattr(importlib.import_module(address), name)


@pytest.mark.parametrize(
    ("address", "name"),
    [pytest.param(*entry, marks=pytest.mark.slow if entry[1] in SOMETIMES else ()) for entry in entries()],
    ids=lambda value: value.removeprefix("torchquant."),
)
def test_wrong_arguments_are_answered(address: str, name: str) -> None:
    function, make = found(address, name), CALLS[address][name]
    with limited(SECONDS), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        call(function, make())  # the valid call
    complaints = []
    for parameter in inspect.signature(function).parameters.keys() & make():
        for what, wrong in fed(function, parameter):
            said = complaint(function, {**make(), parameter: wrong}, wrong)
            if said is not None:
                complaints.append(f"{parameter} = {what}: {said}")
    assert complaints == []


def test_every_public_callable_is_walked_or_says_why_not() -> None:
    listed = importlib.import_module("tests.test_exports").PUBLIC
    missing = []
    walked = {id(found(address, name)) for address, name in entries()}
    walked |= {id(found(a, name)) for a, reasons in NOT_CALLED.items() for names in reasons.values() for name in names}
    for address in dict.fromkeys((*listed, *ADDRESSES)):
        module = importlib.import_module(address)
        for name in module.__all__:
            if callable(getattr(module, name)) and id(getattr(module, name)) not in walked:
                missing.append(f"{address}.{name}")
    assert missing == []


@pytest.mark.parametrize(("address", "name"), entries(), ids=lambda value: value.removeprefix("torchquant."))
def test_the_call_names_every_parameter(address: str, name: str) -> None:
    if name == "fit_quantized":  # its parameters are those of fit
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(found(address, name)).parameters.values()
    wanted = {p.name for p in parameters if p.kind not in kinds}
    assert wanted - set(CALLS[address][name]()) == set()
