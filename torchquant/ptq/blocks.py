"""Find the blocks of a model: the parts whose outputs are matched as a whole by stages that work on blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from torchquant._arguments import checked
from torchquant._tables import ShownAsTables, text_table
from torchquant.errors import ConfigError
from torchquant.graph.segments import in_segments
from torchquant.qmodule import QModule, WeightSlot
from torchquant.utils import weight_slots


@dataclass(frozen=True)
class BlockPlace:
    """A block: the path and the class of its module, and the names of the quantized weights inside."""

    path: str
    kind: str
    layers: tuple[str, ...]


class Blocks(ShownAsTables, list[BlockPlace]):
    """The blocks of a model, in the order in which the model lists its modules. Prints as a table."""

    def __str__(self) -> str:
        rows = [[block.path, block.kind, len(block.layers), ", ".join(block.layers)] for block in self]
        return text_table(["block", "class", "layers", "weights"], rows)


@checked
def find_blocks(model: nn.Module, names: Sequence[str] = (), slots: Sequence[WeightSlot] | None = None) -> Blocks:
    """Find the blocks of a quantized model; each quantized weight is in one of them.

    `names`: paths of modules, with wildcards. Without names the blocks are the members of the outermost ModuleList or
    Sequential with two or more members of one class that hold layers: the layers of a decoder, the blocks of a residual
    network. A layer outside of them is a block of its own. `slots`: the weights that count; None: all quantized ones.
    Raises ConfigError for a name that no module with layers has, and for blocks inside others.

    >>> import torch, torchquant as tq
    >>> part = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> net = nn.Sequential(part(), part(), nn.Linear(4, 2))
    >>> print(find_blocks(tq.quantize(net, "w4a8", torch.ones(1, 4))))
    block  class       layers  weights
    -----  ----------  ------  -------
    0      Sequential  1       0.0
    1      Sequential  1       1.0
    2      Linear      1       2
    """
    if slots is None:
        slots = [slot for slot in weight_slots(model) if slot.quantizer is not None]
    layers = list(dict.fromkeys(slot.path for slot in slots))
    paths = _named(model, names, layers) if names else list(_found(model, "", layers))
    with in_segments(model, paths) as alone:
        if names and (mixed := [path for path in paths if path not in alone]):
            raise ConfigError(
                f"blocks: {', '.join(mixed)} cannot be run alone: other modules run between its operators"
            )
        paths = [path for path in paths if path in alone]
    inside = {layer: next((path for path in paths if _is_inside(layer, path)), layer) for layer in layers}
    blocks = Blocks()
    for path in dict.fromkeys(inside.values()):
        module = model.get_submodule(path)
        kind = type(getattr(module, "layer", module) if isinstance(module, QModule) else module).__name__
        blocks.append(BlockPlace(path, kind, tuple(slot.label for slot in slots if inside[slot.path] == path)))
    return blocks


def _is_inside(layer: str, path: str) -> bool:
    return f"{layer}.".startswith(f"{path}.") or not path


def _named(model: nn.Module, names: Sequence[str], layers: Iterable[str]) -> list[str]:
    """Return the paths that the names select."""
    holding = [path for path, _ in model.named_modules() if any(_is_inside(layer, path) for layer in layers)]
    for name in names:
        if not any(fnmatchcase(path, name) for path in holding):
            known = ", ".join(path for path in holding[:9] if path)
            raise ConfigError(f"blocks: no module with layers is called {name!r}; there are {known}, ...")
    found = [path for path in holding if any(fnmatchcase(path, name) for name in names)]
    for path in found:
        inner = next((other for other in found if other != path and _is_inside(other, path)), None)
        if inner is not None:
            raise ConfigError(
                f"blocks: {inner} lies inside {path or 'the model'}, which is a block too; name one of them"
            )
    return found


def _found(module: nn.Module, path: str, layers: Sequence[str]) -> Iterator[str]:
    """Yield the members of the outermost containers that repeat a class, below a module."""
    holding = _holding(module, path, layers)
    repeated = _repeated(module, holding)
    for where, child in holding.items():
        if _name(child) not in repeated or _repeated(child, _holding(child, where, layers)):
            yield from _found(child, where, layers)
        else:
            yield where


def _holding(module: nn.Module, path: str, layers: Sequence[str]) -> dict[str, nn.Module]:
    """Return the children that hold layers and are none themselves, by path."""
    named = {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
    return {
        where: child
        for where, child in named.items()
        if not isinstance(child, QModule) and any(_is_inside(layer, where) for layer in layers)
    }


def _repeated(module: nn.Module, holding: Mapping[str, nn.Module]) -> set[str]:
    """Return the classes of which a container has two members or more."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return set()
    return {kind for kind, n in Counter(map(_name, holding.values())).items() if n >= 2}


def _name(module: nn.Module) -> str:
    """Return the full name of the module's class: one that runs a graph has a class of its own with this name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
