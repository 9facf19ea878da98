"""Lay a directed graph out in layers from top to bottom, in plain Python.

Sources: Sugiyama, Tagawa, Toda, "Methods for visual understanding of hierarchical system structures" (1981): layers by
the longest path, invisible nodes where an edge passes a layer, order by the means of the neighbours. Deviation:
positions within a layer are the least-squares ones that keep the order and the distances, by pooling neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SWEEPS = 8
PASSING = 0.25
"""Width that an edge takes in a layer that it passes, in widths of a node."""


@dataclass(frozen=True)
class Layout:
    """Positions: `x` in widths of a node, `y` in layers; `routes`: for each edge the (x, y) it goes through."""

    x: list[float]
    y: list[int]
    routes: list[list[tuple[float, float]]]


def lay_out(n: int, edges: Sequence[tuple[int, int]]) -> Layout:
    """Place the nodes 0..n-1; an edge of a node to itself, or back, is drawn but orders nothing.

    >>> placed = lay_out(4, [(0, 1), (1, 2), (0, 2), (2, 3)])
    >>> placed.y, [len(route) for route in placed.routes]
    ([0, 1, 2, 3], [2, 2, 3, 2])
    """
    forward = _without_cycles(n, edges)
    y = _layers(n, forward)
    chains: list[list[int]] = []
    layer_of = list(y)
    for a, b in forward:
        passed = range(len(layer_of), len(layer_of) + max(y[b] - y[a] - 1, 0))
        layer_of += range(y[a] + 1, y[b])
        chains.append([a, *passed, b])
    above: list[list[int]] = [[] for _ in layer_of]
    below: list[list[int]] = [[] for _ in layer_of]
    for chain in chains:
        for a, b in zip(chain, chain[1:], strict=False):
            if layer_of[a] != layer_of[b]:
                below[a].append(b)
                above[b].append(a)
    layers: list[list[int]] = [[] for _ in range(max(layer_of, default=-1) + 1)]
    for node, layer in enumerate(layer_of):
        layers[layer].append(node)
    x = _positions(n, layers, above, below)
    routes = []
    for chain, given, (a, _) in zip(chains, edges, forward, strict=True):
        route = [(x[node], float(layer_of[node])) for node in chain]
        routes.append(route if given[0] == a else route[::-1])
    return Layout(x[:n], y, routes)


def _without_cycles(n: int, edges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the edges with those turned round that lead back to a node from which they can be reached."""
    after: list[list[int]] = [[] for _ in range(n)]
    for a, b in edges:
        if a != b:
            after[a].append(b)
    finished: dict[int, int] = {}
    for start in range(n):
        stack, entered = [(start, iter(after[start]))], {start}
        while stack and start not in finished:
            node, rest = stack[-1]
            for following in rest:
                if following not in finished and following not in entered:
                    entered.add(following)
                    stack.append((following, iter(after[following])))
                    break
            else:
                finished.setdefault(node, len(finished))
                stack.pop()
    return [(a, b) if finished[a] >= finished[b] else (b, a) for a, b in edges]


def _layers(n: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Return the layer of each node: below all that lead to it; a node that nothing leads to, above its first user."""
    before: list[list[int]] = [[] for _ in range(n)]
    after: list[list[int]] = [[] for _ in range(n)]
    for a, b in edges:
        if a != b:
            before[b].append(a)
            after[a].append(b)
    missing = [len(nodes) for nodes in before]
    ready = [node for node in range(n) if not missing[node]]
    layer = [0] * n
    for node in ready:
        for following in after[node]:
            layer[following] = max(layer[following], layer[node] + 1)
            missing[following] -= 1
            if not missing[following]:
                ready.append(following)
    for node in range(n):
        if not before[node] and after[node]:
            layer[node] = min(layer[following] for following in after[node]) - 1
    return layer


def _positions(n: int, layers: list[list[int]], above: list[list[int]], below: list[list[int]]) -> list[float]:
    """Order each layer by the means of its neighbours, then place it as near to them as the widths allow."""
    x = [0.0] * len(above)
    for layer in layers:
        for i, node in enumerate(layer):
            x[node] = float(i)
    for sweep in range(2 * SWEEPS):
        neighbours, order = (below, layers[::-1]) if sweep % 2 else (above, layers)
        for layer in order:
            wanted = {node: _mean([x[other] for other in neighbours[node]], x[node]) for node in layer}
            if sweep < SWEEPS:
                layer.sort(key=lambda node: wanted[node])
            _place(layer, [wanted[node] for node in layer], [1.0 if node < n else PASSING for node in layer], x)
    return x


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _place(layer: list[int], wanted: list[float], widths: list[float], x: list[float]) -> None:
    """Set the positions closest to `wanted` in least squares whose order and distances are kept (pool neighbours)."""
    offsets = [0.0]
    for a, b in zip(widths, widths[1:], strict=False):
        offsets.append(offsets[-1] + (a + b) / 2.0)
    pools: list[tuple[float, int]] = []
    for want, offset in zip(wanted, offsets, strict=True):
        mean, size = want - offset, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, size = (mean * size + other * others) / (size + others), size + others
        pools.append((mean, size))
    placed = (mean for mean, size in pools for _ in range(size))
    for node, position, offset in zip(layer, placed, offsets, strict=True):
        x[node] = position + offset
