"""Watch weights oscillate, and damp them: `python examples/watch_training.py`; needs torchquant[demo].

A weight between two levels is pulled to and fro: its code changes for ever and its gradient says nothing. A monitor
shows it while the training runs; `dampening_loss` pulls weights to their levels, and the oscillation decays.
"""

from itertools import pairwise

import torch
from torch import nn

import torchquant as tq
from torchquant.runs.data import TrainBatches, load_digits
from torchquant.training import Monitor, Ramp, dampening_loss, read_looks, series

torch.manual_seed(0)
data = load_digits(test_copies=1)
train, test = TrainBatches(data), [(data.test_images, data.test_labels)]
net = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
)
tq.fit(net, train, epochs=3, learning_rate=2e-2)
EPOCHS = 3
N_STEPS = EPOCHS * len(list(train))


def trained(path: str, strength: float) -> nn.Module:
    """Train with 3-bit weights; the weight of the damping rises from 0 to `strength`, as the paper does it."""
    rules = [{"weight": "lsq:3/channel", "output": "affine:8"}, {"position": "last", "output": None}]
    model = tq.quantize(net, rules, data.test_images[:2])
    tq.calibrate(model, train, max_batches=4)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    damping = Ramp(0.0, strength, N_STEPS, "cosine")
    n_steps = 0
    with Monitor(model, every=5, to=[f"csv:{path}"]) as monitor:
        for _ in range(EPOCHS):
            for images, labels in train:
                n_steps += 1
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                (loss + dampening_loss(model, damping(n_steps)) if strength else loss).backward()
                optimizer.step()
                monitor.step({"loss": loss})
    tq.observe_weights(model)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    return model


# 1. The same training without and with the damping, each watched in a CSV file.
curves, accuracy = {}, {}
for name, strength in (("plain", 0.0), ("damped", 0.5)):
    model = trained(f"{name}.csv", strength)
    accuracy[name] = tq.evaluate(model, test)
    curves[name] = series(read_looks(f"{name}.csv"))  # figure -> [(step, number)]


# 2. What the two files say: means over each sixth of the training.
def parts(figure: str, name: str) -> list[float]:
    values = [number for _, number in curves[name][figure]]
    cuts = [i * len(values) // 6 for i in range(7)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]


for figure, words in (
    ("weight/oscillation", "weights that turned back, per look"),
    ("weight/flips", "weights whose code changed, per look"),
    ("weight/distance", "mean distance to a threshold, in steps"),
):
    print(words)
    for name in curves:
        print(f"  {name:7}", "  ".join(f"{number:7.4f}" for number in parts(figure, name)))
print(
    f"accuracy: float {tq.evaluate(net, test):.2%},",
    ", ".join(f"{name} {found:.2%}" for name, found in accuracy.items()),
)

assert parts("weight/oscillation", "damped")[-1] < parts("weight/oscillation", "plain")[-1] / 2
assert parts("weight/distance", "damped")[-1] > parts("weight/distance", "plain")[-1] + 0.05
