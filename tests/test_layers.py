"""The layer table of the design: who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import torchquant

PACKAGE = Path(torchquant.__file__).parent

# A file imports only from rows above its own, from its own unit, and from the units before it in its row.
ROWS = (
    (
        "errors",
        "_user_code",
        "_shown",
        "_units",
        "_locks",
        "_registry",
        "_renamed",
        "_lazy",
        "_figures",
        "_modes",
        "_tables",
        "_tensors",
        "_arguments",
        "_files",
        "report",
    ),
    ("kernels", "quantizers_functional"),
    ("range_observers",),
    ("quantizers",),
    ("qmodule", "qmodules", "utils"),
    ("graph", "plan", "models"),
    ("training", "ptq", "search", "analysis"),
    ("deploy", "compat"),
    ("runs", "integrations"),
    ("info", "cli", "demo", "compare", "job", "export_run", "search_run"),
)
ROW = {unit: row for row, units in enumerate(ROWS) for unit in units} | {"__init__": len(ROWS), "__main__": len(ROWS)}
ORDER = {unit: i for i, unit in enumerate([unit for units in ROWS for unit in units] + ["__init__", "__main__"])}
LAST_CORE_ROW = 4
# Files of a plug-in folder do not know each other, except for this shared maths and `_machinery.py`.
PLUG_INS = {
    "quantizers_functional": {"formats", "kernels", "uniform", "affine", "minifloat", "midrise", "binary"},
    "range_observers": set(),
    "quantizers": set(),
}
# What a file may import as it is loaded; everything else waits for the function that needs it.
EAGER = {"torch", "torchquant", *sys.stdlib_module_names}
EAGER_OUTSIDE_CORE = {"numpy"}
OWN_LIBRARY = {("kernels", path.stem): {"triton"} for path in (PACKAGE / "kernels").glob("gpu*.py")}
"""Files that are written in a library, which only code that knows it to be there may import."""
DYING = ("torch.ao", "torch.quantization")


def source_files() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def parts_of(path: Path) -> tuple[str, ...]:
    """("quantizers", "esb") for quantizers/esb.py, ("quantizers",) for its __init__.py."""
    parts = path.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def eager_statements(tree: ast.Module | ast.stmt) -> list[ast.stmt]:
    """Statements that run as the file is loaded: all but function bodies and TYPE_CHECKING blocks."""
    found: list[ast.stmt] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not isinstance(
            node, ast.stmt | ast.excepthandler
        ):
            continue
        if not is_type_checking(node):
            found += [node, *eager_statements(node)]
    return found


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement loads; `from package import submodule` names the submodule."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, "relative import"
    module = node.module or ""
    folder = PACKAGE.parent.joinpath(*module.split("."))
    names = [alias.name for alias in node.names if (module, alias.name) != ("torchquant", "__version__")]
    is_module = [
        module.startswith("torchquant") and any((folder / n).with_suffix(s).exists() for s in ("", ".py"))
        for n in names
    ]
    return [f"{module}.{n}" if m else module for n, m in zip(names, is_module, strict=True)]


def own_imports(nodes: Iterable[ast.AST]) -> set[tuple[str, ...]]:
    """Parts below `torchquant` of every torchquant module that the nodes import."""
    names = {name for node in nodes for name in imported(node)}
    return {tuple(name.split(".")[1:]) or ("__init__",) for name in names if name.split(".")[0] == "torchquant"}


def layer_violations(own: tuple[str, ...], tree: ast.Module) -> list[str]:
    problems = []
    unit, row = own[0], ROW[own[0]]
    for other in sorted(own_imports(ast.walk(tree))):
        if ROW.get(other[0]) is None:
            problems.append(f"{'.'.join(other)} has no row in the layer table")
        elif other[0] != unit and ORDER[other[0]] >= ORDER[unit]:
            problems.append(f"row {row} imports {'.'.join(other)} of row {ROW[other[0]]}")
        elif other[0] == unit and unit in PLUG_INS and len(own) > 1:
            sibling = other[1] if len(other) > 1 else "__init__"
            if sibling == "__init__" or not (sibling.startswith("_") or sibling in PLUG_INS[unit]):
                problems.append(f"plug-in imports its sibling {'.'.join(other)}")
    return problems


def library_violations(own: tuple[str, ...], tree: ast.Module) -> list[str]:
    is_core = ROW[own[0]] <= LAST_CORE_ROW
    nodes = list(ast.walk(tree)) if is_core else eager_statements(tree)
    allowed = (EAGER if is_core else EAGER | EAGER_OUTSIDE_CORE) | OWN_LIBRARY.get(own, set())
    names = [name for node in nodes for name in imported(node)]
    problems = [f"{'core' if is_core else 'module level'} imports {n}" for n in names if n.split(".")[0] not in allowed]
    every = [name for node in ast.walk(tree) for name in imported(node)]
    return problems + [f"imports {name}, which torch will delete" for name in every if name.startswith(DYING)]


def violations(path: Path, source: str) -> list[str]:
    own = parts_of(path)
    if own[0] not in ROW:
        return [f"{own[0]} has no row in the layer table"]
    tree = ast.parse(source)
    return layer_violations(own, tree) + library_violations(own, tree)


@pytest.mark.parametrize("path", source_files(), ids=str)
def test_file_keeps_to_its_row(path: Path) -> None:
    assert violations(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_no_import_cycle() -> None:
    trees = {parts_of(p): ast.parse((PACKAGE / p).read_text(encoding="utf-8")) for p in source_files()}
    graph = {own: own_imports(eager_statements(tree)) for own, tree in trees.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index(("errors",)) < order.index(("quantizers", "affine")) < order.index(("__init__",))


@pytest.mark.parametrize("folder", ["analysis", "deploy", "graph", "search", "training"])
def test_no_module_has_the_name_of_a_function_of_its_package(folder: str) -> None:
    package = importlib.import_module(f"torchquant.{folder}")
    stems = {path.stem for path in source_files() if path.parent == Path(folder) and path.stem != "__init__"}
    assert [name for name in stems if callable(getattr(package, name, None))] == []


@pytest.mark.parametrize("folder", ["deploy", "graph", "plan", "runs", "search", "training"])
def test_no_circle_is_hidden_in_functions_or_annotations(folder: str) -> None:
    files = [path for path in source_files() if path.parts[0] == folder]
    inside = {parts_of(path): ast.parse((PACKAGE / path).read_text(encoding="utf-8")) for path in files}
    imports = {own: {other for other in own_imports(ast.walk(tree)) if other in inside} for own, tree in inside.items()}
    assert (folder,) in TopologicalSorter(imports).static_order()  # CycleError names a circle


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("range_observers/x.py", "from torchquant.quantizers import Quantizer", "row 2 imports quantizers of row 3"),
        ("errors.py", "from torchquant import utils", "row 0 imports utils of row 4"),
        ("qmodule/x.py", "import torchquant", "row 4 imports __init__ of row 10"),
        ("qmodule/x.py", "import torchquant.utils", "row 4 imports utils of row 4"),
        ("ptq/x.py", "def f():\n    from torchquant.search import qss", "row 6 imports search of row 6"),
        ("quantizers/x.py", "from torchquant.quantizers.affine import AffineQuantizer", "sibling quantizers.affine"),
        (
            "quantizers/x.py",
            "from torchquant.quantizers import AffineQuantizer",
            "plug-in imports its sibling quantizers",
        ),
        (
            "quantizers_functional/x.py",
            "from torchquant.quantizers_functional import esb",
            "sibling quantizers_functional.esb",
        ),
        (
            "quantizers_functional/_x.py",
            "import torchquant.quantizers_functional.esb",
            "sibling quantizers_functional.esb",
        ),
        ("quantizers/x.py", "import numpy", "core imports numpy"),
        ("quantizers/x.py", "def f():\n    from scipy import stats", "core imports scipy"),
        ("deploy/x.py", "import onnx", "module level imports onnx"),
        ("cli/x.py", "try:\n    import rich\nexcept ImportError:\n    pass", "module level imports rich"),
        ("models/x.py", "class A:\n    import torchvision", "module level imports torchvision"),
        ("models/x.py", "def f():\n    from torch.ao import quantization", "which torch will delete"),
        ("new_thing/x.py", "import torch", "new_thing has no row"),
        ("deploy/x.py", "from torchquant.nowhere import a", "nowhere has no row"),
    ],
)
def test_checker_catches(path: str, source: str, problem: str) -> None:
    assert any(problem in found for found in violations(Path(path), source)), violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quantizers/x.py", "from torchquant.quantizers._base import Quantizer\nfrom torch import nn"),
        ("quantizers_functional/x.py", "from torchquant.quantizers_functional.uniform import like"),
        ("models/x.py", "from torchquant.utils import qmodules\nimport numpy"),
        ("deploy/x.py", "def f():\n    import onnx"),
        ("deploy/x.py", "from torchquant import __version__"),
        ("deploy/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx"),
    ],
)
def test_checker_allows(path: str, source: str) -> None:
    assert violations(Path(path), source) == []
