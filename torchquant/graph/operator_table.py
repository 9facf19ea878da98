"""The rows of a table of operators, and finding them by what a graph or a forward calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchquant._shown import shown
from torchquant.errors import NameClashError

Target = Callable[..., Any] | str
CountMacs = Callable[[Sequence[Any], Tensor], int]
ROLES = {
    "computes": "new values: a site, whose inputs and output can have quantizers",
    "passes": "values of its first input, zero, or the end of a range: its result lies on the same grid",
    "activates": "fused into the site before it; float elsewhere",
    "layer": "the product inside of a layer; float where a forward calls it with weights of its own",
    "normalizes": "a normalization stays float",
    "shape": "tells a size or a kind, no real numbers",
}
"""Role -> a description of what the operator gives."""
WHY_FLOAT = {
    "activates": "runtimes compute it in float32, or look it up in a table",
    "normalizes": "runtimes compute it in float32",
    "shape": "it computes no real numbers",
}
"""Why operators of these roles have no form in integers."""


@dataclass(frozen=True)
class Operator:
    """One operator of torch, or of a user.

    `targets`: its functions and module classes; as strings the names of functions of torch, of Python's `operator` and
    of methods of Tensor. `names`: what other packages call it, whichever they are. `role`: one of `ROLES`.

    `family`: what rules call it too, where it is a variant of another operator. `path`: what a module that quantizes it
    is called; files hold these names, so what becomes a site later has one of its own. `n_reads`: how many of its first
    inputs carry values; None: all of them.
    `out_of_place`: name of a variant that writes to its input -> what computes the same and leaves its input as it is.
    `activation`: the arguments behind the input -> the module that computes the same. `macs`: all arguments and the
    result -> multiply-adds; None: it multiplies no matrices. `may_be_view`: whether the result can lie in the memory of
    the first input. `why_float`: why integers cannot compute it; "" if they can.
    """

    name: str
    targets: tuple[Target, ...]
    role: str
    family: str = ""
    path: str = ""
    n_reads: int | None = None
    out_of_place: Mapping[str, Target] = field(default_factory=dict)
    activation: Callable[..., nn.Module] | None = None
    macs: CountMacs | None = None
    may_be_view: bool = False
    names: tuple[str, ...] = ()
    why_float: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or self.name)
        object.__setattr__(self, "path", self.path or self.family)
        object.__setattr__(self, "why_float", self.why_float or WHY_FLOAT.get(self.role, ""))

    @property
    def types(self) -> tuple[str, ...]:
        """What rules can call it, its own name first."""
        return tuple(dict.fromkeys((self.name, self.family)))


class OperatorTable(Mapping[str, Operator]):
    """Operators by name, and by what a graph or a forward calls."""

    def __init__(self, rows: Sequence[Operator]) -> None:
        self._rows: dict[str, Operator] = {}
        self._name_of: dict[Any, str] = {}
        self._elsewhere: dict[str, str] = {}
        for row in rows:
            self.put(row)

    def __getitem__(self, name: str) -> Operator:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, row: Operator) -> None:
        """Add a row, or put it in place of that of its name. Raises NameClashError for a target of another row."""
        targets = [_called(target) for target in (*row.targets, *row.out_of_place)]
        for target in targets:
            known = self._name_of.get(target, row.name)
            if known != row.name:
                raise NameClashError(
                    f"{shown(target)} is a target of the operator '{known}' already, not of '{row.name}'"
                )
        self._rows[row.name] = row
        self._name_of.update(dict.fromkeys(targets, row.name))
        self._elsewhere.update(dict.fromkeys(row.names, row.name))

    def of(self, target: Any) -> Operator | None:
        """The operator that a target is: a function, the name of a method, a class of modules; None for others.

        >>> import torch
        >>> from torchquant.graph import OPERATORS
        >>> OPERATORS.of(torch.cat).name, OPERATORS.of("add_").name, OPERATORS.of(torch.tan)
        ('cat', 'add', None)
        """
        target = _called(target)
        name = self._name_of.get(target) if isinstance(target, Hashable) else None
        if name is None and not isinstance(target, str):
            called = getattr(target, "__name__", "")
            if not isinstance(target, type) and _is_of_torch(target):
                name = self._name_of.get(called)
            name = name or self._elsewhere.get(called)
        return None if name is None else self._rows[name]

    def has_target(self, target: Any) -> bool:
        """Whether a row lists the function or class itself."""
        return target in self._name_of

    def own_functions(self) -> tuple[Callable[..., Any], ...]:
        """Functions outside of torch that rows list: a graph calls them and does not look into them."""
        listed = (t for t in self._name_of if not isinstance(t, str | type))
        return tuple(t for t in listed if not _is_of_torch(t))


def _called(target: Any) -> Any:
    """What a target of torch.library is called by, whichever overload it is; another target itself."""
    overload = getattr(target, "_opoverload", target)
    return getattr(overload, "overloadpacket", overload)


def home_of(function: Any) -> str:
    """The package, or the library of torch.library, that a function or a method is from; "" where nothing tells.

    >>> import operator, torch
    >>> home_of(torch.cat), home_of(Tensor.add), home_of(operator.add)
    ('torch', 'torch', '_operator')
    """
    owners = (function, getattr(function, "__objclass__", None))
    module = next((str(owner.__module__) for owner in owners if getattr(owner, "__module__", None)), "")
    library = module.removeprefix("torch._ops.")  # of somebody's operator, registered with torch.library
    return module.partition(".")[0] if library in (module, "aten") else library


def _is_of_torch(function: Any) -> bool:
    """Whether a function is torch's, a method of Tensor, or one of Python's `operator`."""
    return home_of(function) in ("torch", "_operator")


def writes_by_name(name: str) -> bool:
    """Whether a function or method is called as those that write to their first input are.

    >>> writes_by_name("add_"), writes_by_name("add"), writes_by_name("__add__"), writes_by_name("requires_grad_")
    (True, False, False, False)
    """
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
