"""Rotate and round a transformer: `python examples/round_a_transformer.py`; needs torchquant[demo].

The model reads a picture of a digit as sixteen tokens, its rows. One of its channels has large values, as channels of
trained language models do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.runs.data import TrainBatches, load_digits


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).movedim(2, 0).transpose(2, 3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Reader(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.place = nn.Parameter(torch.randn(16, width) / 10)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.squeeze(1)) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


torch.manual_seed(0)
data = load_digits(test_copies=1)
x, labels = data.test_images, data.test_labels
train, test = TrainBatches(data), [(x, labels)]
net = Reader()
tq.fit(net, train, epochs=6, learning_rate=5e-3)
with torch.no_grad():
    for block in net.blocks:  # the function is the same: what the norm gives more, the layer behind it takes less
        for norm, layer in ((block.norm1, block.qkv), (block.norm2, block.up)):
            for parameter in (norm.weight, norm.bias):
                parameter[3] *= 30
            layer.weight[:, 3] /= 30
    net.eval()
    wanted = net(x)

batches = [images for images, _ in list(train)[:8]]
rules = [{"types": ["Linear"], "weight": "affine:4,symmetric=narrow/channel", "input": "affine:6"}]
found = {}
for recipe in (["nearest"], ["gptq:act_order"], ["smoothquant", "gptq:act_order"], ["rotate", "gptq:act_order"]):
    model = tq.quantize(net, rules, x[:2])
    tq.calibrate(model, batches, show_progress=False)
    tq.ptq.run(model, [*recipe, "bias_correction"], batches)
    with torch.no_grad():
        error = (model(x) - wanted).square().mean() / wanted.square().mean()
    found[", ".join(recipe)] = float(-10 * error.log10())
    print(f"{', '.join(recipe)}: {found[', '.join(recipe)]:.1f} dB, accuracy {tq.evaluate(model, test):.2%}")
print(f"float: accuracy {tq.evaluate(net, test):.2%}")
print(tq.ptq.find_blocks(model))
assert found["rotate, gptq:act_order"] > found["nearest"] + 2
