"""Tests, in folders that mirror those of the package. What is about the package as a whole lies here."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
NEED_MORE = ("torchquant.integrations.flower", "torchquant.integrations.speechbrain")
"""Beginnings of modules that need flwr or speechbrain, which the environment of the tests does not have."""
