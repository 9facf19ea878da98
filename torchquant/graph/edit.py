"""Put QModules into one graph: a site becomes a call of its module, an unquantized value gets a quantizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import fx

from torchquant.graph.sites import Site


class GraphEditor:
    """Edits one graph of a region, site by site. Module paths are relative to the module of the region."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes = {node.name: node for node in graph.nodes}
        self.last_of: dict[str, fx.Node] = {}  # name of a fused node -> the node that replaces it
        self.inputs: dict[tuple[str, str], fx.Node] = {}

    def call(self, site: Site, path: str) -> None:
        """Replace the nodes of the site by one call of the module at the path."""
        own = [self.nodes[name] for name in site.nodes]
        if site.module is None:
            own[0].op, own[0].target = "call_module", path
        if site.fused:
            own[0].kwargs = {**own[0].kwargs, "fused": True}
            own[-1].replace_all_uses_with(own[0])
            for node in reversed(own[1:]):
                self.last_of[node.name] = own[0]
                self.graph.erase_node(node)

    def quantize_inputs(
        self,
        site: Site,
        specs: Mapping[str, str],
        quantized: Collection[str],
        module_for: Callable[[str, str, str], str | None],
    ) -> None:
        """Quantize the inputs of the site that nothing has quantized yet, each once.

        `specs`: slot, "input" or "probabilities", -> the spec there. `quantized`: the sites whose output has a
        quantizer. `module_for(node, spec, slot)`: path of the module that quantizes the value, None to leave it float.
        """
        readers = [self.nodes[name] for name in site.nodes if not site.fused or name == site.nodes[0]]
        for read in site.reads:
            if read.softmax and "probabilities" in specs:
                self._quantize_softmax(read.softmax, specs["probabilities"], module_for)
                continue
            if "input" not in specs or any(source in quantized for source in read.sources):
                continue
            key = (read.node, specs["input"])
            value = self.last_of.get(read.node) or self.nodes[read.node]
            if key not in self.inputs:
                path = module_for(*key, "input")
                if path is None:
                    continue
                self.inputs[key] = self._insert_after(value, path)
            for reader in readers:
                reader.replace_input_with(value, self.inputs[key])

    def _quantize_softmax(self, name: str, spec: str, module_for: Callable[[str, str, str], str | None]) -> None:
        """Quantize the result of a softmax for all who read it."""
        value = self.nodes[name]
        path = None if (name, spec) in self.inputs else module_for(name, spec, "probabilities")
        if path is not None:
            new = self.inputs[name, spec] = self._insert_after(value, path)
            value.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def _insert_after(self, value: fx.Node, path: str) -> fx.Node:
        after = value
        while after.next.op == "placeholder":
            after = after.next
        with self.graph.inserting_after(after):
            return self.graph.call_module(path, (value,))
