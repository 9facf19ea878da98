"""Find the bit width of each layer: `python examples/learn_precision.py`; needs torchquant[demo].

Widths are learned by gradient, then allocated by sensitivity, for the same mean width. For any model, with a report in
a folder: `torchquant search qpl MODEL --budget 'bits<=3'` and `torchquant search allocate ...`.
"""

import torch
from torch import nn

import torchquant as tq
from torchquant.runs.data import TrainBatches, load_digits
from torchquant.search import PrecisionLearning, PrecisionSettings, allocate, sensitivity

torch.manual_seed(0)
data = load_digits(test_copies=1)
train, test = TrainBatches(data), [(data.test_images, data.test_labels)]
net = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
    *(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)),
)
tq.fit(net, train, epochs=4, learning_rate=2e-2)
example, budget = data.test_images[:2], "bits<=3.5"

# 1. {n} is a width to learn. Weights and widths train together; the budget limits the mean width.
rules = [
    {"weight": "affine:{n},symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"},
    {"position": "last", "output": None},
]
settings = PrecisionSettings(epochs=5, weight_rate=5e-3)
search = PrecisionLearning(net, rules, example, budget, settings, min_bits=2, max_bits=8)
for record in search.run(train):
    print(record, {place: round(width, 2) for place, width in record.widths.items()})
learned = search.retrain(train, epochs=3, learning_rate=5e-3)

# 2. Without a search: per-layer sensitivity, then the widths with the smallest total degradation.
degradations = sensitivity(net, rules, example, list(train)[:4], method="kl")
found = allocate(net, rules, example, budget, degradations, solver="dp")
print(found)
allocated = found.plan.apply(net)
tq.calibrate(allocated, train, max_batches=8)
tq.fit(allocated, train, epochs=8, learning_rate=5e-3, state=tq.QModuleState.QUANT_AWARE_TRAIN)

# 3. Both keep the budget.
print(f"\nfloat: {tq.evaluate(net, test):.2%}")
for name, plan, model in (("learned", search.derive(), learned), ("allocated", found.plan, allocated)):
    widths = {site.path: site.weight for site in plan.sites if site.weight}
    print(f"{name}: {tq.evaluate(model, test):.2%}, {plan.cost(net, example).weight_bytes} bytes, {widths}")
assert search.costs.totals(search.choice_within_budget())["bits"] <= 3.5
assert found.totals["bits"] <= 3.5
