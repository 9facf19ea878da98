"""Choose the roundings of a trained CNN: `python examples/round_after_training.py`; needs torchquant[demo].

For any model, in a folder where a stopped run resumes: `torchquant ptq MODEL --recipe gptq,bias_correction`.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import torchquant as tq
from torchquant.deploy import certify, export_onnx
from torchquant.runs.data import TrainBatches, load_digits

torch.manual_seed(0)
data = load_digits(test_copies=1)
x, labels = data.test_images, data.test_labels
train, test = TrainBatches(data), [(x, labels)]
net = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)),
)
tq.fit(net, train, epochs=6, learning_rate=2e-2)
net.eval()
with torch.no_grad():
    wanted = net(x)


def noise(model: nn.Module) -> float:
    """The power of the float output over that of the difference to it, in dB."""
    with torch.no_grad():
        return float(10 * torch.log10(wanted.square().mean() / (model(x) - wanted).square().mean()))


# 1. Inputs to look at. Algorithms match the float model on them, so give some thousand rows.
batches = [images for images, _ in list(train)[:8]]
rules = [{"weight": "affine:3,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"}]

# 2. A recipe is a list of stages; each is one algorithm with its options.
found = {}
for recipe in (["nearest"], ["gptq:act_order"], ["gptq:act_order", "brecq:steps=60"]):
    model = tq.quantize(net, rules, x[:2])
    report = tq.ptq.run(model, ["calibrate", *recipe, "bias_correction"], batches)
    found[", ".join(recipe)] = noise(model)
    print(f"{', '.join(recipe)}: {found[', '.join(recipe)]:.1f} dB, accuracy {tq.evaluate(model, test):.2%}")
print(f"float: accuracy {tq.evaluate(net, test):.2%}\n\n{report}")

# 3. What was chosen is what the file holds, and a certificate says so.
with tempfile.TemporaryDirectory() as folder:
    certificate = certify(model, export_onnx(model, Path(folder) / "rounded.onnx", x[:2]), x[:16])
print(f"\ncertificate passed: {certificate.passed}")
assert certificate.passed
assert found["gptq:act_order"] > found["nearest"] + 2
