"""Search schemes for layers within a budget of bytes: `python examples/search_schemes.py`; needs torchquant[demo].

For any model, with a report in a folder: `torchquant search qss MODEL --budget 'bytes<=1kB'`.
"""

import torch
from torch import nn

import torchquant as tq
from torchquant.runs.data import TrainBatches, load_digits
from torchquant.search import SchemeSearch, SearchSettings

torch.manual_seed(0)
data = load_digits(test_copies=1)
train, test = TrainBatches(data), [(data.test_images, data.test_labels)]
net = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
    *(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)),
)
tq.fit(net, train, epochs=4, learning_rate=2e-2)

# 1. The candidates of each layer: any spec strings, of any widths. A slot with a list is searched.
specs = ["clipq:2/channel", "twn/channel", "pot:2/channel", "clipq:4/channel", "esb:4,k=1/channel"]
rules = [{"weight": specs, "input": "affine:8", "output": "affine:8"}, {"position": "last", "output": None}]
example = data.test_images[:2]
search = SchemeSearch(net, rules, example, "bytes<=1kB", SearchSettings(epochs=5, weight_rate=5e-3, arch_rate=0.1))

# 2. Search. Weights train on every second batch, the shares of the schemes on the others.
for record in search.run(train):
    print(f"{record}, {record.costs['bytes']:.0f} bytes expected")

# 3. The plan always keeps the budget. Train under it.
model = search.retrain(train, epochs=3, learning_rate=5e-3)
plan = search.derive()
for place, shares in search.history[-1].shares.items():
    print(
        f"{place}: "
        + ", ".join(f"{spec.partition('/')[0]} {share:.2f}" for spec, share in zip(specs, shares, strict=True))
    )
print(plan)

# 4. Compare with one scheme everywhere, trained for as many epochs.
print(f"\nfloat: {tq.evaluate(net, test):.2%}")
print(f"searched: {tq.evaluate(model, test):.2%}, {plan.cost(net, example).weight_bytes} bytes")
for spec in ("twn/channel", "clipq:4/channel"):
    single = tq.quantize(net, [{**rules[0], "weight": spec}, rules[1]], example)
    tq.calibrate(single, train, max_batches=8)
    tq.fit(single, train, epochs=8, learning_rate=5e-3, state=tq.QModuleState.QUANT_AWARE_TRAIN)
    print(f"{spec}: {tq.evaluate(single, test):.2%}, {single.plan.cost(net, example).weight_bytes} bytes")
assert plan.cost(net, example).weight_bytes <= 1000
