"""Use NNI's quantizers with only the import changed: `python examples/from_nni.py`; needs torchquant[demo].

Before: `from nni.algorithms.compression.pytorch.quantization import QAT_Quantizer`.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.compat.nni import QAT_Quantizer
from torchquant.runs.data import load_digits


class Mnist(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU6()
        self.fc = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu1(self.bn1(self.conv1(x))), 2)
        return self.fc(x.flatten(1))


torch.manual_seed(0)
data = load_digits(test_copies=2)
model = Mnist()
optimizer = torch.optim.Adam(model.parameters(), 3e-3)

config_list = [
    {
        "quant_types": ["input", "weight"],
        "quant_bits": {"input": 8, "weight": 8},
        "quant_dtype": "int",
        "quant_scheme": {"weight": "per_channel_symmetric", "input": "per_tensor_affine"},
        "op_types": ["Conv2d"],
    },
    {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]},
    {"quant_types": ["output"], "quant_bits": 8, "quant_start_step": 20, "op_types": ["ReLU6"]},
]
quantizer = QAT_Quantizer(model, config_list, optimizer, dummy_input=data.test_images[:1])
quantizer.compress()
print(quantizer.plan)  # what the list says, site by site

model.train()
batches = torch.Generator().manual_seed(0)
for _ in range(4):
    for x, labels in data.train_batches(batches, 64):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
score = tq.evaluate(model, [(data.test_images, data.test_labels)])

with tempfile.TemporaryDirectory() as folder:
    config = quantizer.export_model(Path(folder) / "model.pth", Path(folder) / "calibration.pth")
    plain = Mnist()
    plain.load_state_dict(torch.load(Path(folder) / "model.pth", weights_only=True))
print({name: sorted(entry) for name, entry in config.items()})
print(f"accuracy with 8 bits: {score:.2%}")
assert score > 0.5
