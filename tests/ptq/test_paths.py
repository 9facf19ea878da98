"""Which weights share channels, found by one run: every scaling of a found set leaves the function as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.ptq.paths import ChannelSets, channel_sets


def scaled(net: nn.Module, x: Tensor, quantize: bool = True) -> tuple[ChannelSets, list[str]]:
    """Scale every set of a float64 model by random factors and check that its function stays; return the sets."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
                tensor.uniform_(0.3, 2.0)
    model = (tq.quantize(net.eval(), "w8a8", x) if quantize else net).eval()
    with torch.no_grad():
        before = model(x)
        found = channel_sets(model, x)
        generator = torch.Generator().manual_seed(0)
        for one in found.sets:
            if "bounded" not in one.notes:
                one.scale(torch.rand(one.n, generator=generator) * 4 + 0.2)
        after = model(x)
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-12)
    return found, [one.name for one in found.sets]


class Net(nn.Module):
    def __init__(self, forward, **children: nn.Module):
        super().__init__()
        self.act = forward
        for name, child in children.items():
            self.add_module(name, child)
        self.double()

    def forward(self, x):
        return self.act(self, x)


def conv(i: int, o: int, **more) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **more)


IMAGE = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CASES = {
    "relu and pools": (
        lambda m, x: m.b(F.avg_pool2d(F.max_pool2d(F.relu(m.a(x)), 2), 2)),
        {"a": conv(4, 6), "b": conv(6, 2)},
        ["a -> b"],
    ),
    "prelu, leaky relu and dropout": (
        lambda m, x: m.b(F.dropout(F.leaky_relu(m.p(m.a(x))), training=m.training)),
        {"a": conv(4, 6), "p": nn.PReLU(6), "b": conv(6, 2)},
        ["a -> b"],
    ),
    "depthwise": (
        lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
        {"a": conv(4, 6), "b": conv(6, 6, groups=6), "c": conv(6, 2)},
        ["a -> b", "b -> c"],
    ),
    "groups and transposed": (
        lambda m, x: m.c(m.b(m.a(x))),
        {"a": conv(4, 6, groups=2), "b": nn.ConvTranspose2d(6, 4, 3, groups=2), "c": conv(4, 4, groups=2)},
        ["a -> b", "b -> c"],
    ),
    "flatten repeats": (
        lambda m, x: m.b(m.a(x).relu().view(x.size(0), -1)),
        {"a": conv(4, 6), "b": nn.Linear(6 * 64, 3)},
        ["a -> b"],
    ),
    "concatenation by slices": (
        lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x)], 1)),
        {"a": conv(4, 2), "b": conv(4, 3), "c": conv(5, 2)},
        ["a, b -> c"],
    ),
    "chunk and shuffle": (
        lambda m, x: m.b(F.channel_shuffle(torch.cat(m.a(x).chunk(2, 1)[::-1], 1), 2)) + m.c(m.a(x)),
        {"a": conv(4, 4), "b": conv(4, 2), "c": conv(4, 2)},
        ["a -> b, c"],
    ),
    "additions make one set": (
        lambda m, x: m.d((m.a(x) + m.b(x)).relu()) + m.c(m.a(x)),
        {"a": conv(4, 5), "b": conv(4, 5), "c": conv(5, 2), "d": conv(5, 2)},
        ["a, b -> d, c"],
    ),
    "gated product": (
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        {"gate": conv(4, 6), "up": conv(4, 6), "down": conv(6, 2)},
        ["up -> down"],
    ),
    "squeeze and excitation": (
        lambda m, x: m.b(m.a(x) * m.s(m.a(x).mean((2, 3), keepdim=True)).sigmoid()),
        {"a": conv(4, 6), "s": nn.Conv2d(6, 6, 1), "b": conv(6, 2)},
        ["a -> s, b"],
    ),
    "in place": (
        lambda m, x: m.b(m.a(x).relu_().mul_(2.0)),
        {"a": conv(4, 6), "b": conv(6, 2)},
        ["a -> b"],
    ),
    "batch norm alone": (
        lambda m, x: m.b(m.n(torch.cat([m.a(x), m.c(x)], 1)).relu()),
        {"a": conv(4, 2), "c": conv(4, 4), "n": nn.BatchNorm2d(6), "b": conv(6, 2)},
        ["a, c -> n", "n -> b"],
    ),
    "norm with a scale": (
        lambda m, x: m.b(m.n(x.flatten(2).mT)),
        {"n": nn.LayerNorm(4), "b": nn.Linear(4, 2)},
        ["n -> b"],
    ),
}


QUANTIZED = ("depthwise", "flatten repeats", "additions make one set", "batch norm alone")


@pytest.mark.parametrize(
    ("name", "quantize"), [*((name, False) for name in CASES), *((name, True) for name in QUANTIZED)]
)
def test_what_commutes_is_scaled_together(name, quantize):
    forward, children, expected = CASES[name]
    torch.manual_seed(0)
    _, names = scaled(Net(forward, **children), IMAGE, quantize)
    assert names == expected


ENDS = {
    "silu": (lambda m, x: m.b(F.silu(m.a(x))), "read by silu"),
    "output": (lambda m, x: (h := m.a(x), m.b(h))[::-1], "an output of the model"),
    "softmax": (lambda m, x: m.b(m.a(x).softmax(1)), "read by softmax"),
    "constant": (lambda m, x: m.b(m.a(x) + 1.0), "added to what no layer can scale"),
    "input": (lambda m, x: m.b(m.a(x) + x), "added to what no layer can scale"),
    "comparison": (lambda m, x: m.b(m.a(x) * (m.a(x) > 0)), "read by gt"),
    "square": (lambda m, x: m.b(m.a(x) * m.a(x)), "read by mul"),
    "power": (lambda m, x: m.b(m.a(x) ** torch.full((4, 1, 1), 2.0)), "read by pow"),
    "mean of squares": (lambda m, x: m.b(m.a(x) * m.a(x).pow(2).mean(1, keepdim=True)), "read by pow"),
    "reciprocal": (lambda m, x: m.b(1.0 / m.a(x)), "read by __rdiv__"),
    "mean over channels": (lambda m, x: m.b(m.a(x).mean(1, keepdim=True).expand(-1, 4, -1, -1)), "read by mean"),
    "written in part": (lambda m, x: m.b(written(m.a(x))), "read by __setitem__"),
    "negative bound": (lambda m, x: m.b(F.hardtanh(m.a(x))), "read by hardtanh"),
    "weight used twice": (
        lambda m, x: m.b(m.a(x)) + F.conv2d(x, m.a.weight.flip(0), padding=1),
        "its parameter is also a value",
    ),
}


def written(x: Tensor) -> Tensor:
    x[:, 0] = 1.0
    return x


@pytest.mark.parametrize("name", ENDS)
def test_what_does_not_commute_ends_a_path_and_is_named(name):
    forward, why = ENDS[name]
    torch.manual_seed(0)
    net = Net(forward, a=conv(4, 4), b=conv(4, 4))
    found = channel_sets(net.eval(), IMAGE)
    reasons = {end.path: reason for end, reason in found.left if type(end).__name__ == "Rows"}
    assert why in reasons["a"]
    assert not any(end.path == "a" for one in found.sets for end in one.producers)


def test_an_upper_bound_is_noted_with_its_activation():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.c(F.relu6(m.b(m.r(m.a(x))))), a=conv(4, 4), r=nn.ReLU6(), b=conv(4, 4), c=conv(4, 4))
    first, second = channel_sets(net.eval(), IMAGE).sets
    assert first.notes["bounded"] == [net.r]
    assert second.notes["bounded"] == ["its values end at 6, in the model"]


def test_attention_and_heads_that_share_a_value_head():
    class Attention(nn.Module):
        def __init__(self, groups: int):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8 // groups)
            self.v, self.o = nn.Linear(8, 8 // groups), nn.Linear(8, 8)
            self.groups = groups

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
            k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
            z = (q @ k.mT).softmax(-1) @ v
            return self.o((y + z).transpose(1, 2).flatten(2))

    for groups in (1, 2):
        torch.manual_seed(0)
        found, names = scaled(Attention(groups).double(), torch.randn(2, 5, 8).double())
        assert names == ["v -> o"]
        assert found.sets[0].n == 8 // groups


def test_tied_embedding_is_left():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.b.weight = self.e.weight

        def forward(self, x):
            return self.b(self.a(self.e(x)))

    found = channel_sets(Tied().eval(), torch.tensor([[1, 2]]))
    assert found.sets == ()
    assert any("also" in why for end, why in found.left if end.path == "e")


def test_readers_that_did_not_run_end_a_path():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x):
            return self.experts[0](x)

    net = nn.Sequential(nn.LayerNorm(4), Experts())
    found = channel_sets(net.eval(), torch.randn(2, 4))
    assert found.sets == ()
    assert found.unseen == ("1.experts.1.weight",)
    assert "did not run and may read it" in found.left[0][1]
