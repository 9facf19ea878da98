"""The pages of the catalogue: one for each registry of the package."""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch
import yaml

from docs.site_pages import drawings
from docs.site_pages.markdown import table
from torchquant import errors
from torchquant._registry import Registry
from torchquant.cli import algorithms, operators, schemes
from torchquant.graph import OPERATORS
from torchquant.plan import RULE_SETS
from torchquant.ptq import PTQ, RECIPES
from torchquant.quantizers import QUANTIZERS, catalogue, make_quantizer
from torchquant.quantizers_functional import GRADIENTS
from torchquant.range_observers import OBSERVERS

T = TypeVar("T")


def pages() -> dict[str, str | bytes]:
    """Make every page and picture of the catalogue: its address in the site -> its contents."""
    made: dict[str, str | bytes] = {
        "catalogue/schemes.md": _schemes(),
        "catalogue/gradients.md": _gradients(),
        "catalogue/observers.md": _observers(),
        "catalogue/rule_sets.md": _rule_sets(),
        "catalogue/ptq.md": _ptq(),
        "catalogue/operators.md": _operators(),
        "catalogue/errors.md": _errors(),
    }
    made |= {f"catalogue/levels/{entry.name}.svg": drawings.levels(entry.name) for entry in catalogue()}
    return made | {f"catalogue/gradients/{name}.svg": drawings.gradient(name) for name in GRADIENTS}


def _schemes() -> str:
    parts = [
        "# Schemes",
        "Every registered scheme by the name it has in a spec string, "
        "`scheme[:n_bits][,option=value][/granularity][@gradient]`. The drawings are made by running each scheme on "
        "normal data of deviation 1: real values to the right, quantized values up, every level as a red tick. "
        "[All schemes in one table](../schemes.md); `torchquant schemes NAME` prints one.",
    ]
    for entry in catalogue():
        facts = schemes.cells(entry)
        parts += [
            f"## {entry.name}",
            entry.summary,
            f"![levels of {entry.name}](levels/{entry.name}.svg)",
            table(("", ""), ([key, facts[key]] for key in list(facts)[1:] if facts[key])),
        ]
        parts.append(f"Class: {_link(f'torchquant.quantizers.{QUANTIZERS[entry.name].__name__}')}")
    return "\n\n".join(parts) + "\n"


def _gradients() -> str:
    parts = [
        "# Gradient estimators",
        "An estimator says which gradient passes through rounding and clipping; `@name` at the end of a spec string "
        "chooses it, `quantizer.set_gradient(name, **options)` changes it later. The drawings are derivatives that "
        "autograd returns.",
    ]
    for name, kind in _entries(GRADIENTS):
        options = ", ".join(f"{p.name}={p.default}" for p in inspect.signature(kind).parameters.values())
        parts += [f"## {name}", _about(kind), f"![derivative of {name}](gradients/{name}.svg)"]
        parts += [f"Options: `{options}`"] * bool(options)
    return "\n\n".join(parts) + "\n"


def _observers() -> str:
    data = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    x = data.sample((10_000,))
    rows = []
    for name in OBSERVERS:
        quantizer = make_quantizer(f"affine:8,observer={name}", "output")
        quantizer.pre_observe(x)
        quantizer.post_observe(x)
        ends = quantizer.format().decode(torch.tensor(quantizer.code_range))
        low, high = (float(end) for end in ends)
        rows.append([f"[{name}](#{name})", f"{low:.2f} to {high:.2f}"])
    parts = [
        "# Range observers",
        "An observer determines the real interval that a quantizer covers; `observer=name` in a spec string chooses "
        "it. The ranges are those that an 8-bit quantizer takes for 10,000 values of Student's t distribution with 3 "
        "degrees of freedom, "
        f"which lie between {float(x.min()):.2f} and {float(x.max()):.2f}.",
        table(("observer", "range"), rows),
    ]
    for name, kind in _entries(OBSERVERS):
        parts += [f"## {name}", _about(kind), f"Constructor: `{kind.__name__}{_signature(kind)}`"]
    return "\n\n".join(parts) + "\n"


def _rule_sets() -> str:
    parts = [
        "# Rule sets",
        "`torchquant.quantize(model, NAME, x)` and `--rules NAME` take a rule set by name. Each is a list of rules, "
        "of which later ones win; this is what stands in them.",
    ]
    for name, rules in RULE_SETS.items():
        parts += [f"## {name}", f"```yaml\n{yaml.safe_dump(_plain(rules), sort_keys=False)}```"]
    return "\n\n".join(parts) + "\n"


def _ptq() -> str:
    parts = [
        "# Post-training algorithms",
        "Stages of a recipe, for `torchquant.ptq.run(model, [...], batches)` and `torchquant ptq --recipe`. "
        "[Round after training](../ptq.md) says how to choose.",
        "## Recipes",
        table(
            ("recipe", "rules", "stages"), ([n, _rules_of(r.rules), ", ".join(r.stages)] for n, r in RECIPES.items())
        ),
    ]
    for name, kind in _entries(PTQ):
        facts = algorithms.columns(name)
        parts += [f"## {name}", _about(kind), table(("", ""), ([k, facts[k]] for k in list(facts)[1:] if facts[k]))]
    return "\n\n".join(parts) + "\n"


def _operators() -> str:
    rows = [operators.columns(row) for row in OPERATORS.values()]
    parts = [
        "# Operators",
        "The operators that plans, the integer reference and ONNX files know. A row is one call of "
        f"{_link('torchquant.graph.register_operator')}.",
        table(tuple(rows[0]), (row.values() for row in rows)),
    ]
    return "\n\n".join(parts) + "\n"


def _errors() -> str:
    parts = ["# Errors and warnings", "Each message says what came, what is allowed and what to do."]
    for name in errors.__all__:
        kind = getattr(errors, name)
        bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        parts += [f"## {name}", f"Subclass of {bases}.", _about(kind)]
    return "\n\n".join(parts) + "\n"


def _entries(registry: Registry[T]) -> list[tuple[str, T]]:
    return [(name, registry[name]) for name in registry]


def _link(address: str) -> str:
    return f"{{py:obj}}`{address}`"


def _about(kind: type) -> str:
    """Return the docstring of a class without its examples, which the API reference has."""
    return inspect.cleandoc(kind.__doc__ or "").partition("\n>>> ")[0].strip()


def _signature(kind: type) -> str:
    return str(inspect.signature(kind).replace(return_annotation=inspect.Signature.empty)).replace("'", "")


def _rules_of(rules: object) -> str:
    return rules if isinstance(rules, str) else "rules of its own"


def _plain(value: object) -> object:
    """Replace what YAML has no notation for, such as functions and tuples, by what a reader recognises."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else getattr(value, "__name__", str(value))
