"""AutoQNN's tools: draw a model, record inputs and outputs of modules, counts, sparsity, the roofline."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchquant._files import write_whole
from torchquant.errors import ConfigError, MissingDependencyError, require
from torchquant.graph.trace import NotTraceable, traced_graph
from torchquant.plan import QuantPlan
from torchquant.utils import weight_slots

devices: dict[str, tuple[float, float, float]] = {
    "QS-855+": (1.032e12, 34.1 * 2**30, 10.0),
    "QS-888+": (1.72e12, 51.2 * 2**30, 10.0),
    "1080ti": (10.616e12, 484.0 * 2**30, 250.0),
    "2080ti": (11.75e12, 616.0 * 2**30, 250.0),
    "3090": (29.28e12, 936.2 * 2**30, 350.0),
    "A6000": (31.29e12, 768.0 * 2**30, 300.0),
    "Xeon E5-2678 v3": (0.95e12, 68.0 * 2**30, 120.0),
    "Apple A14 Bionic": (1.536e12, 34.1 * 2**30, 10.0),
    "Kirin 9000": (2.332e12, 42.7 * 2**30, 10.0),
}
"""Device -> (operations per second, bytes per second, watts), as AutoQNN lists them."""
PICTURES = (".svg", ".png", ".pdf")


def view_module(
    module: nn.Module, input_shapes: Any = None, save_path: str | os.PathLike[str] | None = None
) -> tuple[dict[str, str], list[tuple[str, str]], str]:
    """Describe a model as a graph: (node -> label, edges, source in the DOT language).

    If torch.fx can trace the forward, nodes are layers and operators; else they are modules, with edges from each to
    its parts. `save_path`: graphviz draws a .svg, .png or .pdf, if the package and the program are installed; without
    them, and for any other ending, a text is written to a .txt file beside it. `input_shapes` is an argument of AutoQNN
    and not needed.

    >>> nodes, edges, dot = view_module(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    >>> edges
    [('input_1', '_0'), ('_0', '_1'), ('_1', 'output')]
    """
    try:
        nodes, edges = _graph(module, traced_graph(module))
    except NotTraceable:
        nodes, edges = _tree(module)
    lines = [f'  "{name}" [label="{label}"];' for name, label in nodes.items()]
    lines += [f'  "{a}" -> "{b}";' for a, b in edges]
    dot = "\n".join(["digraph Net {", *lines, "}"])
    if save_path is not None:
        _draw(Path(save_path), dot, nodes, edges)
    return nodes, edges, dot


def _graph(module: nn.Module, graph: fx.Graph) -> tuple[dict[str, str], list[tuple[str, str]]]:
    def label(node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target}: {type(module.get_submodule(str(node.target))).__name__}"
        return str(getattr(node.target, "__name__", node.target))

    kept = [node for node in graph.nodes if node.op != "get_attr"]
    nodes = {node.name: label(node) for node in kept}
    edges = [(a.name, node.name) for node in kept for a in node.all_input_nodes if a.name in nodes]
    return nodes, edges


def _tree(module: nn.Module) -> tuple[dict[str, str], list[tuple[str, str]]]:
    nodes = {path or "model": f"{path or 'model'}: {type(part).__name__}" for path, part in module.named_modules()}
    return nodes, [(path.rpartition(".")[0] or "model", path) for path in nodes if path != "model"]


def _draw(path: Path, dot: str, nodes: Mapping[str, str], edges: Sequence[tuple[str, str]]) -> None:
    if path.suffix in PICTURES:
        try:
            graphviz = require("graphviz", "report")
            drawn = graphviz.Source(dot).pipe(format=path.suffix[1:])
        except (MissingDependencyError, RuntimeError, OSError):  # the package or its program is missing
            path = path.with_suffix(".txt")
        else:
            write_whole(path, lambda temporary: temporary.write_bytes(drawn))
            return
    feeds: dict[str, list[str]] = {}
    for a, b in edges:
        feeds.setdefault(a, []).append(b)
    lines = [f"{label}  ->  {', '.join(feeds.get(name, ['-']))}" for name, label in nodes.items()]
    write_whole(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n", encoding="utf-8"))


class ModuleIOs:
    """Records inputs and outputs of modules; for quantizers, real and quantized tensors.

    `named_modules`: (name, module) pairs. `register()` begins, `unregister()` ends; `inputs` and `outputs` hold the
    last tensors. `draw_differences(rows)` returns a matplotlib figure with both distributions of each.

    >>> layer = nn.ReLU()
    >>> records = ModuleIOs([("relu", layer)])
    >>> records.register()
    >>> y = layer(torch.tensor([-1.0, 2.0]))
    >>> records.unregister()
    >>> records.differences()
    {'relu': 0.5}
    """

    def __init__(self, named_modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.modules = dict(named_modules)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def register(self) -> None:
        """Start recording."""
        for name, module in self.modules.items():

            def note(m: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                self.inputs[name], self.outputs[name] = args[0].detach().clone(), output.detach().clone()

            self._handles.append(module.register_forward_hook(note))

    def unregister(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def differences(self) -> dict[str, float]:
        """Compute the mean squared difference of input and output, for modules that keep the shape."""
        self._check()
        return {
            name: float((self.outputs[name] - x).square().mean())
            for name, x in self.inputs.items()
            if x.shape == self.outputs[name].shape
        }

    def draw_differences(self, rows: int = 1, save_path: str | os.PathLike[str] | None = None) -> Any:
        """Draw distributions of inputs and outputs, a panel per module. Raises MissingDependencyError, ConfigError."""
        self._check()
        figure = require("matplotlib.figure", "report")
        columns = -(-len(self.inputs) // rows)
        drawn = figure.Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
        panels = drawn.subplots(rows, columns, squeeze=False).flat
        for panel, (name, x) in zip(panels, self.inputs.items(), strict=False):
            panel.hist(x.flatten().float().cpu().numpy(), bins=100, alpha=0.6, label="in")
            panel.hist(self.outputs[name].flatten().float().cpu().numpy(), bins=100, alpha=0.6, label="out")
            panel.set_title(name, fontsize=8)
            panel.legend(fontsize=7)
        if save_path is not None:
            path = Path(save_path)
            write_whole(path, lambda temporary: drawn.savefig(temporary, format=path.suffix[1:] or "png"))
        return drawn

    def _check(self) -> None:
        if not self.inputs:
            raise ConfigError("nothing was recorded; call register(), run the model, then unregister()")


def get_flops_params_mems(
    module: nn.Module,
    input_shape: Sequence[int],
    w_bit: int,
    a_bit: int,
    name: str = "module",
    verbose: int = 1,
) -> tuple[float, int, float]:
    """Count multiply-adds of one sample, parameters, and bytes of parameters and layer outputs at these widths.

    AutoQNN calls multiply-adds FLOPs. Outputs are counted for layers and operators that compute, as in `plan.cost`.
    """
    cost = QuantPlan(()).cost(module, torch.randn(*input_shape))
    macs = float(cost.macs)
    n_params = sum(parameter.numel() for parameter in module.parameters())
    memory = n_params * w_bit / 8 + cost.activation_bytes / 4 * a_bit / 8
    if verbose:
        print(
            f"Flops, Params and Mems of {name} is [{macs / 1e9:.2f}GFLOPs,{n_params / 1e6:.2f}M, {memory / 2**20:.2f}M]"
        )
    return macs, n_params, memory


def get_attainable_FLOPS(  # noqa: N802 - published name
    model: nn.Module,
    input_shape: Sequence[int],
    device_key: str,
    w_bit: int = 32,
    a_bit: int = 32,
    model_name: str = "model",
) -> float:
    """Compute the operations per second of a device with a model by the roofline: its peak, or the memory bound.

    Source: Williams et al. 2009. AutoQNN ignores `w_bit` and `a_bit`; here they count. Raises ConfigError.
    """
    if device_key not in devices:
        raise ConfigError(f"device_key must be one of {', '.join(devices)}; got {device_key!r}")
    macs, _, memory = get_flops_params_mems(model, input_shape, w_bit, a_bit, model_name, verbose=0)
    peak, bandwidth, _ = devices[device_key]
    attainable = macs / memory * bandwidth
    kind = "Compute-bound" if attainable >= peak else "IO-bound"
    print(f"{model_name} is {kind} model on {device_key}")
    return min(peak, attainable)


def count_zero(w: Tensor) -> int:
    """Count the elements that are 0."""
    return int((w == 0).sum())


def stats_module_sparsity(module: nn.Module, name: str) -> float:
    """Compute the share of zeros in one parameter of a module."""
    w = getattr(module, name)
    return count_zero(w) / w.numel()


def stats_sparsity(
    parameters_to_prune: Iterable[tuple[nn.Module, str]], verbose: int = 1
) -> tuple[tuple[float, ...], float]:
    """Compute the share of zeros in each (module, name of a parameter), and in all together."""
    pairs = list(parameters_to_prune)
    each = tuple(stats_module_sparsity(module, name) for module, name in pairs)
    sizes = [getattr(module, name).numel() for module, name in pairs]
    total = sum(share * n for share, n in zip(each, sizes, strict=True)) / max(sum(sizes), 1)
    if verbose:
        for i, ((_, name), share) in enumerate(zip(pairs, each, strict=True)):
            print(f"Sparsity in submodule[{i}].{name}: {share:.2%}")
        print(f"Global sparsity: {total:.2%}")
    return each, total


@torch.no_grad()
def stats_quantized_sparsity(model: nn.Module) -> dict[str, float]:
    """Compute the share of weights that quantize to 0, for every quantized layer that has observed its weight."""
    found = {}
    for slot in weight_slots(model):
        if (quantizer := slot.quantizer) is not None and quantizer.is_ready:
            found[slot.key] = count_zero(quantizer(slot.seen())) / slot.weight.numel()
    return found
