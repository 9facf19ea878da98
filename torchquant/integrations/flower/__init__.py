"""Federated learning by Flower with packed low-bit updates in both directions. Needs the extra `flower`."""

from torchquant.integrations.flower.client import PackedUpdates as PackedUpdates
from torchquant.integrations.flower.local_grid import LocalGrid as LocalGrid
from torchquant.integrations.flower.strategy import PackedStrategy as PackedStrategy
from torchquant.integrations.flower.strategy import Traffic as Traffic

__all__ = ["LocalGrid", "PackedStrategy", "PackedUpdates", "Traffic"]
