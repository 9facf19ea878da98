"""Define the rows of the table of operators, and find them by the functions and modules that a graph calls."""

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
    "computes": "computes new values: a site, whose inputs and output can have quantizers",
    "passes": "passes on values of its first input, zero, or the end of a range: its result lies on the same grid",
    "activates": "is fused into the site before it; float elsewhere",
    "layer": "is the product inside of a layer; float where a forward calls it with its own weights",
    "normalizes": "normalizes; stays float",
    "shape": "returns a size or a type, no real numbers",
}
"""Role -> a description of the operator's result."""
WHY_FLOAT = {
    "activates": "runtimes compute it in float32, or look it up in a table",
    "normalizes": "runtimes compute it in float32",
    "shape": "it computes no real numbers",
}
"""Role -> the reason why its operators have no integer form."""


@dataclass(frozen=True)
class Operator:
    """One operator of torch, or of a user.

    `targets`: its functions and module classes; strings are names of functions of torch, of Python's `operator` and of
    methods of Tensor. `names`: its names in any other package. `role`: one of `ROLES`.

    `family`: another name in rules, for a variant of another operator. `path`: the name of the module that quantizes
    it; files hold these names, so a new site needs a new one. `n_reads`: how many of its first inputs carry values;
    None: all. `out_of_place`: name of a variant that writes to its input -> the variant that does not. `activation`:
    arguments after the input -> the module that computes the same. `macs`: all arguments and the result ->
    multiply-adds; None: it multiplies no matrices. `may_be_view`: whether the result can share the memory of the first
    input. `why_float`: why integers cannot compute it; "" if they can.
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
        """Names of the operator in rules, its own name first."""
        return tuple(dict.fromkeys((self.name, self.family)))


class OperatorTable(Mapping[str, Operator]):
    """Operators by name, and by the functions and modules that a graph or a forward calls."""

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
        """Add a row, or replace the row of the same name. Raises NameClashError for a target of another row."""
        targets = [_called(target) for target in (*row.targets, *row.out_of_place)]
        for target in targets:
            known = self._name_of.get(target, row.name)
            if known != row.name:
                raise NameClashError(
                    f"{shown(target)} is already a target of the operator '{known}' and cannot be one of '{row.name}'"
                )
        self._rows[row.name] = row
        self._name_of.update(dict.fromkeys(targets, row.name))
        self._elsewhere.update(dict.fromkeys(row.names, row.name))

    def of(self, target: Any) -> Operator | None:
        """Find the operator of a target: a function, the name of a method, or a module class; None for others.

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
        """Tell whether a row lists the function or class itself."""
        return target in self._name_of

    def own_functions(self) -> tuple[Callable[..., Any], ...]:
        """Return the functions outside of torch that rows list: a graph calls them without tracing into them."""
        listed = (t for t in self._name_of if not isinstance(t, str | type))
        return tuple(t for t in listed if not _is_of_torch(t))


def _called(target: Any) -> Any:
    """Return the packet of a torch.library target, whichever overload it is; any other target itself."""
    overload = getattr(target, "_opoverload", target)
    return getattr(overload, "overloadpacket", overload)


def home_of(function: Any) -> str:
    """Return the package, or the torch.library library, of a function or a method; "" if it is unknown.

    >>> import operator, torch
    >>> home_of(torch.cat), home_of(Tensor.add), home_of(operator.add)
    ('torch', 'torch', '_operator')
    """
    owners = (function, getattr(function, "__objclass__", None))
    module = next((str(owner.__module__) for owner in owners if getattr(owner, "__module__", None)), "")
    library = module.removeprefix("torch._ops.")  # for an operator that was registered with torch.library
    return module.partition(".")[0] if library in (module, "aten") else library


def _is_of_torch(function: Any) -> bool:
    """Tell whether a function is from torch, a method of Tensor, or from Python's `operator`."""
    return home_of(function) in ("torch", "_operator")


def writes_by_name(name: str) -> bool:
    """Tell whether the name of a function or method is that of one that writes to its first input.

    >>> writes_by_name("add_"), writes_by_name("add"), writes_by_name("__add__"), writes_by_name("requires_grad_")
    (True, False, False, False)
    """
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
