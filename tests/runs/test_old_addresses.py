"""Addresses of version 0.1 that files and scripts of users name."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from tests import ROOT

NAMED = {
    "torchquant.demo.network:Block": "torchquant.runs.small_resnet:Block",
    "torchquant.demo.network:QuantBlock": "torchquant.runs.small_resnet:QuantBlock",
    "torchquant.demo.network:QuantSmallResNet": "torchquant.runs.small_resnet:QuantSmallResNet",
    "torchquant.demo.network:SmallResNet": "torchquant.runs.small_resnet:SmallResNet",
    "torchquant.demo.mobilenet:InvertedResidual": "torchquant.runs.small_mobilenet:InvertedResidual",
    "torchquant.demo.mobilenet:SmallMobileNetV2": "torchquant.runs.small_mobilenet:SmallMobileNetV2",
    "torchquant.compare.tasks:Gray": "torchquant.runs.networks:Gray",
    "torchquant.export_run:float_model": "torchquant.runs.export:float_model",
    "torchquant.demo:load_digits": "torchquant.runs.data:load_digits",
    "torchquant.demo:run_demo": "torchquant.runs.demo:run_demo",
    "torchquant.job:run_job": "torchquant.runs.quantize:run_job",
    "torchquant.compare:compare": "torchquant.runs.compare:compare",
    "torchquant.search_run:run_search": "torchquant.runs.search:run_search",
}
"""Old address -> new one; the classes stand in pickles, the builder in packed files."""
LOAD = """
import pickle, sys
for name in sys.argv[1:]:
    old, new = (pickle.loads("c{}\\n{}\\n.".format(*half.split(":")).encode()) for half in name.split("="))
    assert old is new, name
"""


def test_what_pickles_of_the_first_version_name_is_found() -> None:
    names = [f"{old}={new}" for old, new in NAMED.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("address", ["demo", "compare", "search_run", "job", "export_run"])
def test_an_old_address_has_the_names_of_the_new_one(address: str) -> None:
    module = importlib.import_module(f"torchquant.{address}")
    assert module.__all__
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
