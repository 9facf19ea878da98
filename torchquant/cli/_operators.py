"""`torchquant operators`: the table of operators, with what integers and files make of each."""

from __future__ import annotations

from torchquant._registry import did_you_mean
from torchquant.deploy.integer_ops import HANDLERS
from torchquant.deploy.onnx_forms import ONNX_FORMS
from torchquant.errors import UnknownNameError, require
from torchquant.graph import OPERATORS, Operator
from torchquant.graph.operators import ROLES


def columns(row: Operator) -> dict[str, str]:
    """What is shown of an operator, in words."""
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
    """All that is known of an operator, in words."""
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


def show(name: str | None) -> None:
    """Print the table, or all that is known of one operator. Raises UnknownNameError."""
    console = require("rich.console", "cli").Console()
    table = require("rich.table", "cli").Table
    if name is None:
        rows = [columns(row) for row in OPERATORS.values()]
        whole = table(*rows[0], title="operators")
        for row in rows:
            whole.add_row(*row.values())
        console.print(whole)
        return
    found = OPERATORS.get(name) or OPERATORS.of(name)
    if found is None:
        raise UnknownNameError(f"no operator '{name}';{did_you_mean(name, OPERATORS)} known: {', '.join(OPERATORS)}")
    single = table("", found.name)
    for key, text in list(details(found).items())[1:]:
        single.add_row(key, text)
    console.print(single)
