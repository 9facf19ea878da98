"""Use AutoQNN's `convert` with only the import changed: `python examples/from_autoqnn.py`; needs torchquant[demo].

Before: `import autoqnn`.
"""

import torch
import torch.nn.functional as F
from torch import nn

import torchquant.compat.autoqnn as autoqnn
from torchquant.compat.autoqnn.utils import ModuleIOs, view_module
from torchquant.runs.data import load_digits

torch.manual_seed(0)
data = load_digits(test_copies=1)
module = nn.Sequential(
    *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(16 * 4, 10)),
)
q_model = autoqnn.core.convert(
    module,
    quantize_config_dict={
        "weight_quant": autoqnn.quantizers.ESB_PerChannel(
            bitwidth=4, linear_bits=1, per_channel=True, mean_shift=False
        ),
        "act_quant": autoqnn.quantizers.FixedQuantAct(bitwidth=8),
    },
)
nodes, edges, dot = view_module(q_model, (1, 1, 16, 16))
print(dot)

batches = torch.Generator().manual_seed(0)
optimizer = torch.optim.Adam(q_model.parameters(), 3e-3)
for epoch in range(4):
    loader = list(data.train_batches(batches, 64))
    autoqnn.core.train(loader, q_model, F.cross_entropy, optimizer, epoch, [autoqnn.core.top1])
test_loader = [(data.test_images, data.test_labels)]
loss, (top1, top5) = autoqnn.core.validate(
    test_loader, q_model, F.cross_entropy, [autoqnn.core.top1, autoqnn.core.top5], print_freq=0
)

layers = {name: part for name, part in q_model.named_modules() if isinstance(part, autoqnn.modules.Conv2d)}
records = ModuleIOs((name, layer.weight_quant) for name, layer in layers.items())
records.register()
q_model(data.test_images[:1])
records.unregister()
print({name: f"{error:.2e}" for name, error in records.differences().items()})
print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.3f}")
assert top1 > 50.0
