"""What every test gets: its own fixed seed, whatever ran before it; and a process that does no work again and again."""

from __future__ import annotations

import functools
import gc
import random
import sys

import pytest
import torch


def pytest_collection_finish() -> None:
    """Search for garbage seldom, and not in what was imported and collected: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _translations_are_read_once() -> None:
    """Keep torch.onnx's table of translations: it is made anew, from a thousand sources, for every file."""
    table = getattr(sys.modules.get("torch.onnx._internal.exporter._registration"), "ONNXRegistry", None)
    if table is not None and not hasattr(table.from_torchlib, "cache_info"):
        table.from_torchlib = staticmethod(functools.cache(table.from_torchlib))
