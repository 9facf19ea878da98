"""Layouts of graphs: edges lead down, nodes keep their distance, chains are straight, cycles are drawn."""

from __future__ import annotations

import random

import pytest

from torchquant.report.layout import lay_out


def test_a_chain_is_straight() -> None:
    layout = lay_out(50, [(i, i + 1) for i in range(49)])
    assert layout.y == list(range(50))
    assert len(set(layout.x)) == 1


def test_a_skip_passes_beside_the_nodes() -> None:
    layout = lay_out(4, [(0, 1), (1, 2), (2, 3), (0, 3)])
    for x, y in layout.routes[3][1:-1]:
        assert abs(x - layout.x[int(y)]) > 0.6


@pytest.mark.parametrize("seed", range(20))
def test_edges_lead_down_and_nodes_keep_their_distance(seed: int) -> None:
    random.seed(seed)
    n = random.randint(1, 40)
    pairs = [sorted(random.sample(range(n), 2)) for _ in range(random.randint(0, 60))] if n > 1 else []
    edges = [(a, b) for a, b in pairs]
    layout = lay_out(n, edges)
    assert all(layout.y[a] < layout.y[b] for a, b in edges)
    places = sorted(zip(layout.y, layout.x, strict=True))
    assert all(c - a > 0 or d - b > 0.999 for (a, b), (c, d) in zip(places, places[1:], strict=False))
    for (a, b), route in zip(edges, layout.routes, strict=True):
        assert route[0] == (layout.x[a], layout.y[a])
        assert route[-1] == (layout.x[b], layout.y[b])
        assert [y for _, y in route] == list(range(layout.y[a], layout.y[b] + 1))


@pytest.mark.parametrize("seed", range(10))
def test_cycles_are_drawn(seed: int) -> None:
    random.seed(seed)
    edges = [(random.randrange(12), random.randrange(12)) for _ in range(30)]
    layout = lay_out(12, edges)
    for (a, b), route in zip(edges, layout.routes, strict=True):
        assert (route[0], route[-1]) == ((layout.x[a], layout.y[a]), (layout.x[b], layout.y[b]))
    assert lay_out(2, [(0, 1), (1, 0)]).y == [0, 1]


def test_a_deep_graph_is_laid_out_without_recursion() -> None:
    assert lay_out(3000, [(i, i + 1) for i in range(2999)]).y[-1] == 2999


def test_nothing_is_laid_out() -> None:
    assert lay_out(0, []).x == []
