"""QSS: search the scheme of each layer."""

from __future__ import annotations

from torchquant.search.learning.engine import Search
from torchquant.search.settings import SearchSettings


class SchemeSearch(Search):
    """Quantizing scheme search: candidates are mixed with Gumbel-softmax shares, and the shares are learned.

    AutoQNN (Gong et al. 2023, arXiv:2304.03782) names the search; its code does not contain it, so the form is ours
    (docs/algorithms.md F4). For the arguments see `Search`. Rules give a slot a list of candidate specs
    (`default_candidates`), of any registered schemes, widths and granularities, for weights and activations.
    EdMIPS (Cai 2020) is the same with widths as candidates and `cost_weight` on "bitops".

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> data = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(4)]
    >>> rules = [{"weight": ["clipq:2/channel", "twn/channel"], "output": "affine:8"}]
    >>> search = SchemeSearch(net, rules, data[0][0], settings=SearchSettings(epochs=2))
    >>> history = search.run(data)
    >>> model = search.retrain(data, epochs=1)
    >>> sorted({site.weight for site in model.plan.sites} - {"clipq:2/channel", "twn/channel"})
    []
    """

    defaults = SearchSettings()
