"""`torchquant operators`: show the table of operators, with the integer and ONNX form of each."""

from __future__ import annotations

from typing import Annotated

from torchquant._registry import did_you_mean
from torchquant.cli._options import Argument
from torchquant.cli._tables import show_all, show_one
from torchquant.deploy.integer.operators import HANDLERS
from torchquant.deploy.onnx.operators import ONNX_FORMS
from torchquant.errors import UnknownNameError
from torchquant.graph import OPERATORS, Operator
from torchquant.graph.operator_table import ROLES


def columns(row: Operator) -> dict[str, str]:
    """Describe an operator as one row of the table."""
    form = ONNX_FORMS.get(row.name)
    moves = "codes move" if row.role == "passes" else ""
    in_files = "as the exporter of torch has it"
    if form is not None:
        in_files = ", ".join(form.kernels) or ("codes move" if form.moves else f"float32: {form.why_float}")
    return {
        "operator": row.name,
        "rules call it": row.family if row.role == "computes" else "",
        "role": row.role,
        "integers": "yes" if row.name in HANDLERS else moves or f"float32: {row.why_float}",
        "ONNX Runtime": "" if row.role == "shape" else in_files,
        "multiply-adds": "counted" if row.macs else "",
    }


def details(row: Operator) -> dict[str, str]:
    """Describe everything that is known about an operator."""
    form = ONNX_FORMS.get(row.name)
    targets = (target if isinstance(target, str) else target.__name__ for target in row.targets)
    return {
        **columns(row),
        "role": f"{row.role}: {ROLES[row.role]}",
        "inputs with values": "all"
        if row.n_reads is None
        else f"the first {row.n_reads}"
        if row.n_reads > 1
        else "one",
        "functions, methods, modules": ", ".join((*targets, *row.names)),
        "writing to its input": ", ".join(row.out_of_place),
        "ONNX nodes": "" if form is None else ", ".join(form.nodes),
    }


def command(
    name: Annotated[str | None, Argument("One operator, or one of its functions or methods.")] = None,
) -> None:
    """Show the known operators: in plans, in the integer reference, and in ONNX files."""
    if name is None:
        show_all("operators", [columns(row) for row in OPERATORS.values()])
        return
    found = OPERATORS.get(name) or OPERATORS.of(name)
    if found is None:
        raise UnknownNameError(f"no operator '{name}';{did_you_mean(name, OPERATORS)} known: {', '.join(OPERATORS)}")
    show_one(details(found))
