"""A registry of names, with an error for a clash and the known names in every message."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from torchquant._shown import shown
from torchquant.errors import NameClashError, UnknownNameError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask for the known name nearest to `name`, with a space before the question; "" if none is near.

    >>> did_you_mean("afine", ["affine", "esb"])
    " did you mean 'affine'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" did you mean '{close[0]}'?" if close else ""


def not_one_of(what: str, value: object, allowed: Iterable[str]) -> str:
    """Say that a value is none of the allowed ones, which they are, and which one is near.

    >>> not_one_of("mode", "qta", ["ptq", "qat"])
    "mode must be one of ptq, qat, got 'qta'; did you mean 'qat'?"
    """
    known = list(allowed)
    hint = did_you_mean(value, known) if isinstance(value, str) else ""
    return f"{what} must be one of {', '.join(known)}, got {shown(value)}{hint and ';'}{hint}"


class Registry(Generic[T]):
    """A dictionary that refuses to override and that explains a miss.

    >>> schemes = Registry("scheme")
    >>> @schemes.register("affine")
    ... class Affine: ...
    >>> schemes["afine"]
    Traceback (most recent call last):
    torchquant.errors.UnknownNameError: no scheme 'afine'; did you mean 'affine'? Known: affine
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its object under `name`."""

        def enter(entry: T) -> T:
            known = self._entries.setdefault(name, entry)
            if known is not entry:
                raise NameClashError(f"{self.kind} '{name}' is already registered as {known!r}")
            return entry

        return enter

    def unregister(self, name: str) -> None:
        """Remove `name`, for plug-ins and tests that are loaded and unloaded."""
        del self._entries[self._checked(name)]

    def _checked(self, name: str) -> str:
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            known = ", ".join(sorted(self._entries)) or "none"
            raise UnknownNameError(f"no {self.kind} '{name}';{hint} Known: {known}")
        return name

    def __getitem__(self, name: str) -> T:
        return self._entries[self._checked(name)]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
