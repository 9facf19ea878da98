"""What every test gets: its own fixed seed, whatever ran before it; and a process that does no work again and again."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.browser import CHROMIUM, Browser

os.environ["TORCHQUANT_FLOATS"] = "0"  # float models of one test are not those of another one


def pytest_collection_finish() -> None:
    """Search for garbage seldom, and not in what was imported and collected: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium, the same for all pages; without one the test is skipped."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to open the page in")
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _export_looks_things_up_once() -> None:
    """Keep what torch.onnx.export gathers anew for every file, in half of its time: translations and operators."""
    table = getattr(sys.modules.get("torch.onnx._internal.exporter._registration"), "ONNXRegistry", None)
    if table is not None and not hasattr(table.from_torchlib, "cache_info"):
        table.from_torchlib = staticmethod(functools.cache(table.from_torchlib))
    utils: Any = sys.modules.get("torch._export.utils")
    gather = getattr(utils, "_materialize_cpp_cia_ops", None)
    if gather is not None and not hasattr(gather, "cache_info"):
        utils._materialize_cpp_cia_ops = functools.cache(gather)
