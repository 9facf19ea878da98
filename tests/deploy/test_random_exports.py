"""Random networks of convolutions, norms, activations, sums, joins, pools: their files compute what QUANT_EVAL does."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchquant as tq
from torchquant import QModuleState as S
from torchquant.deploy import export_onnx, to_integer

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

ACTIVATIONS = (nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.PReLU)
POOLS = (
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1),
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
)


class RandomNet(nn.Module):
    """Three to seven blocks and a head, drawn by a seed, for pictures (N, 3, 16, 16)."""

    def __init__(self, seed):
        super().__init__()
        self.draw = random.Random(seed)
        self.kinds, self.blocks = [], nn.ModuleList()
        self.channels, self.size = 3, 16
        for _ in range(self.draw.randint(3, 7)):
            kind = self.draw.choice(
                ["layer"] * 4 + ["add", "add", "subtract", "join", "gate", "pool", "up", "pad", "split"]
            )
            block = getattr(self, kind)()
            if block is not None:
                self.kinds.append(kind)
                self.blocks.append(block)
        self.pooled = self.draw.random() < 0.5
        self.head = nn.Linear(self.channels * (1 if self.pooled else self.size**2), 5)

    def layer(self):
        draw, ins, size = self.draw, self.channels, self.size
        kernel, dilation, stride = draw.choice([1, 3, 5]), draw.choice([1, 1, 2]), draw.choice([1, 1, 2])
        padding, groups = dilation * (kernel - 1) // 2, draw.choice([1, 1, ins])
        if padding >= size:
            return None
        outs = ins * draw.choice([1, 2]) if groups > 1 else draw.choice([4, 6, 8])
        mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
        conv = nn.Conv2d(ins, outs, kernel, stride, padding, dilation, groups, draw.random() < 0.6, mode)
        self.channels, self.size = outs, (size - 1) // stride + 1
        norm = [nn.BatchNorm2d(outs)] if draw.random() < 0.5 else []
        return nn.Sequential(conv, *norm, draw.choice(ACTIVATIONS)())

    def add(self):
        return nn.Conv2d(self.channels, self.channels, 3, padding=1, groups=self.draw.choice([1, self.channels]))

    subtract = add

    def join(self):
        self.channels += 4
        return nn.Conv2d(self.channels - 4, 4, 1)

    def gate(self):
        return nn.Conv2d(self.channels, self.channels, 1)

    def pool(self):
        if self.size < 4 or self.size % 2:
            return None
        self.size //= 2
        return self.draw.choice(POOLS)

    def up(self):
        if self.size > 16:
            return None
        self.size *= 2
        groups = self.draw.choice([1, 2]) if self.channels % 2 == 0 else 1
        return nn.ConvTranspose2d(self.channels, self.channels, 2, 2, groups=groups)

    def pad(self):
        self.size += 2
        return nn.Identity()

    def split(self):
        half = self.channels // 2
        return nn.Conv2d(half, half, 1) if self.channels % 2 == 0 else None

    def forward(self, x):
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind in ("layer", "pool", "up"):
                x = block(x)
            elif kind == "add":
                x = F.relu(x + block(x))
            elif kind == "subtract":
                x = block(x) - x
            elif kind == "join":
                x = torch.cat([x, block(x)], 1)
            elif kind == "gate":
                x = x * torch.sigmoid(block(F.adaptive_avg_pool2d(x, 1)))
            elif kind == "pad":
                x = F.pad(x, (1, 1, 1, 1))
            else:
                a, b = x.chunk(2, 1)
                x = torch.cat([block(a), b], 1)
        return self.head(x.mean((2, 3)) if self.pooled else x.flatten(1))


def random_net(seed):
    torch.manual_seed(seed)
    net = RandomNet(seed).eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return net, torch.randn(8, 3, 16, 16)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
@torch.no_grad()
def test_a_file_in_a_plain_session_is_quant_eval(seed, tmp_path):
    net, x = random_net(seed)
    model = tq.quantize(net, "int8-ort", x)
    with tq.qmodule_state(model, S.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    expected = model(x)
    quantization = (expected - net(x)).square().mean()
    session = runtime.InferenceSession(str(export_onnx(model, tmp_path / "net.onnx", x, verify=False)))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for other in (torch.from_numpy(got), to_integer(model, x)(x)):
        noise = (other - expected).square().mean()
        assert float(noise) < max(0.5 * float(quantization), 1e-4 * float(expected.square().mean()))
