"""QPL: learn the bit width of each layer."""

from __future__ import annotations

from torchquant.search.learning.engine import Search
from torchquant.search.settings import PrecisionSettings


class PrecisionLearning(Search):
    """Quantizing precision learning: bit widths are real parameters, learned by gradient together with the weights.

    AutoQNN (Gong et al. 2023, arXiv:2304.03782) names it; its released code has no gradient for the width, so the form
    is ours (docs/algorithms.md F3), with AutoQNN's names `float_bitwidth`, `target_bitwidth` (here a `budget` of "bits"
    or "act_bits"). For the arguments see `Search`. Rules give a slot a spec with `{n}`; a list of such specs learns
    scheme and width together. BitPruning (Nikolic et al. 2020) is the form "interp" with `cost_weight` in place of a
    budget.

    >>> import torch
    >>> from torch import nn
    >>> from torchquant.search import PrecisionSettings
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> data = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(4)]
    >>> rules = [{"weight": "affine:{n},symmetric=narrow/channel", "output": "affine:8"}]
    >>> search = PrecisionLearning(net, rules, data[0][0], "bits<=4", PrecisionSettings(epochs=2))
    >>> history = search.run(data)
    >>> search.costs.totals(search.choice_within_budget())["bits"] <= 4
    True
    """

    defaults = PrecisionSettings()
