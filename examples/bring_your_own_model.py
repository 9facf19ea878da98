"""Quantize any model in one call: `python examples/bring_your_own_model.py`; needs torchquant[demo].

The model here stands for yours: residuals, an activation used twice, functions and methods in its forward.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.runs.data import TrainBatches, load_digits


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.act = nn.ReLU()
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        x = torch.cat([self.act(x + y), x], dim=1)
        x = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.head(F.dropout(x, 0.1, self.training))


torch.manual_seed(0)
data = load_digits(test_copies=2)
train, test = TrainBatches(data), [(data.test_images, data.test_labels)]  # stand for your DataLoaders
net = Mine()
tq.fit(net, train, epochs=10, learning_rate=2e-2)
floating = tq.evaluate(net, test)

# 1. Rules say which quantizer goes where; later rules win, site by site and slot by slot.
rules = [
    {"weight": "affine:4,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8", "fold_bn": True},
    {"position": ["first", "last"], "weight": "affine:8,symmetric=narrow/channel"},
    {"names": ["conv2"], "weight": "lsq:3/channel"},
]
example = data.test_images[:2]
model = tq.quantize(net, rules, example)  # computes what `net` computes, bit for bit, until a state is set
print(model.plan)
print(model.plan.cost(net, example))

# 2. Calibrate, then train.
tq.calibrate(model, train, max_batches=4)
calibrated = tq.evaluate(model, test)
tq.fit(model, train, epochs=2, learning_rate=2e-3, state=tq.QModuleState.QUANT_AWARE_TRAIN)
trained = tq.evaluate(model, test)

# 3. A plan is a value: save it, load it, compare it, change it, revert it.
with tempfile.TemporaryDirectory() as folder:
    plan = tq.QuantPlan.load(model.plan.save(Path(folder) / "plan.yaml"))
print(plan.diff(plan.replace("conv1", weight="esb:4,k=1/channel")))
floats_again = plan.revert(model)

print(f"\nfloat {floating:.2%}, calibrated {calibrated:.2%}, trained {trained:.2%}")
assert type(floats_again) is Mine
assert trained > floating - 0.1
