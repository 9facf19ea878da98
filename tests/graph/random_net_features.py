"""What a random net can be made of: each feature writes a few lines of Python into a block, with choices of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple


class Domain(NamedTuple):
    """The one shape that all values of a net have, and the layers that keep it; `C` channels on axis `axis`."""

    shape: str
    channels: int
    axis: int
    inner: tuple[int, ...]
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    narrowing: str


DOMAINS = {
    "image": Domain(
        "4, 6, 6",
        4,
        1,
        (2, 3),
        (
            "nn.Conv2d(4, 4, 3, padding=1)",
            "nn.Conv2d(4, 4, 3, padding=1, bias=False)",
            "nn.Conv2d(4, 4, 1)",
            "nn.Conv2d(4, 4, 3, padding=1, groups=4)",
            'nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")',
            "nn.ConvTranspose2d(4, 4, 3, padding=1)",
        ),
        ("nn.BatchNorm2d(4)", "nn.GroupNorm(2, 4)"),
        "nn.Conv2d(8, 4, 1)",
    ),
    "sequence": Domain(
        "5, 8",
        8,
        2,
        (1,),
        ("nn.Linear(8, 8)", "nn.Linear(8, 8, bias=False)"),
        ("nn.LayerNorm(8)",),
        "nn.Linear(16, 8)",
    ),
    "vector": Domain(
        "8",
        8,
        1,
        (),
        ("nn.Linear(8, 8)", "nn.Linear(8, 8, bias=False)"),
        ("nn.BatchNorm1d(8)", "nn.LayerNorm(8)"),
        "nn.Linear(16, 8)",
    ),
}
ACTIVATIONS = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.GELU()",
    "nn.SiLU()",
    "nn.Hardswish()",
    "nn.LeakyReLU(0.1)",
    "nn.Tanh()",
    "nn.Sigmoid()",
    "nn.ReLU6()",
)


@dataclass
class Block:
    """A class under way: lines of `__init__` and of `forward`, and the values at hand."""

    name: str
    domain: Domain
    live: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    flags: list[tuple[str, str]] = field(default_factory=list)
    """(attribute, another value it may be set to)."""
    used: set[str] = field(default_factory=set)
    answer: tuple[str, ...] = ("return {0}",)
    """The lines that return the result {0} and another value {1}."""
    outside: str = "x"
    """The value the block was given, which the caller may read later."""
    count: int = 0

    def new(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def pick(self, r: Random) -> str:
        """One of the latest values."""
        name = r.choice(self.live[-3:])
        self.used.add(name)
        return name

    def say(self, *lines: str) -> None:
        self.forward += lines

    def let(self, expression: str, name: str = "") -> str:
        """A new value."""
        name = name or self.new("v")
        self.say(f"{name} = {expression}")
        self.live.append(name)
        return name

    def attribute(self, prefix: str, expression: str) -> str:
        name = f"self.{self.new(prefix)}"
        self.init.append(f"{name} = {expression}")
        return name

    def finish(self, result: str, other: str, indent: str = "") -> None:
        self.say(*(indent + line.format(result, other) for line in self.answer))

    def layer(self, r: Random, kind: str = "") -> str:
        name = self.attribute("layer", kind or r.choice(self.domain.layers))
        if not kind:
            self.layers.append(name)
        return name

    def flag(self, prefix: str, value: str, other: str) -> str:
        name = self.attribute(prefix, value)
        self.flags.append((name.removeprefix("self."), other))
        return name


Feature = Callable[[Block, Random], None]
FEATURES: dict[str, tuple[int, Feature]] = {}
"""Name -> (weight of being drawn, the function that writes it)."""
SHARP = {"data_branch", "masked_fill_", "counter_read", "buffer_read"}
"""Features whose values jump or grow from call to call, so that 8 bits need not be near."""


def feature(weight: int = 2) -> Callable[[Feature], Feature]:
    def register(f: Feature) -> Feature:
        FEATURES[f.__name__] = (weight, f)
        return f

    return register


def _mean(b: Block, value: str) -> str:
    """An expression for a value's mean over positions, which broadcasts against it."""
    return f"{value}.mean({b.domain.inner}, keepdim=True)" if b.domain.inner else f"{value}.mean(1, keepdim=True)"


# Layers


@feature(6)
def layer(b: Block, r: Random) -> None:
    b.let(f"{b.layer(r)}({b.pick(r)})")


@feature(6)
def layer_norm_act(b: Block, r: Random) -> None:
    layer_, norm = b.layer(r), b.attribute("norm", r.choice(b.domain.norms))
    act = b.attribute("act", r.choice(ACTIVATIONS))
    b.let(f"{act}({norm}({layer_}({b.pick(r)})))")


@feature(3)
def layer_act(b: Block, r: Random) -> None:
    b.let(f"{b.attribute('act', r.choice(ACTIVATIONS))}({b.layer(r)}({b.pick(r)}))")


@feature()
def norm_alone(b: Block, r: Random) -> None:
    b.let(f"{b.attribute('norm', r.choice(b.domain.norms))}({b.pick(r)})")


@feature(3)
def layer_again(b: Block, r: Random) -> None:
    name = r.choice(b.layers) if b.layers else b.layer(r)
    b.let(f"{name}({b.pick(r)})")
    if r.random() < 0.3:
        b.let(f"{name}({b.pick(r)}).tanh()")


@feature(3)
def act_shared(b: Block, r: Random) -> None:
    act = b.attribute("act", r.choice(ACTIVATIONS))
    first = b.let(f"{act}({b.layer(r)}({b.pick(r)}))")
    b.let(f"{act}({b.layer(r)}({first}) + {b.pick(r)})")


@feature()
def norm_twice(b: Block, r: Random) -> None:
    norm = b.attribute("norm", r.choice([*b.domain.norms, b.domain.norms[0].replace(")", ", affine=False)")][:-1]))
    b.let(f"{norm}({b.layer(r)}({norm}({b.pick(r)})))")


@feature()
def sequential(b: Block, r: Random) -> None:
    parts = [r.choice(b.domain.layers), r.choice(b.domain.norms), r.choice(ACTIVATIONS), "nn.Dropout(0.2)"]
    kept = ", ".join(parts[:1] + r.sample(parts[1:], r.randint(1, 3)))
    b.let(f"{b.attribute('seq', f'nn.Sequential({kept})')}({b.pick(r)})")


@feature()
def module_list(b: Block, r: Random) -> None:
    parts = ", ".join(r.choice(b.domain.layers) for _ in range(2))
    layers, value = b.attribute("many", f"nn.ModuleList([{parts}])"), b.let(f"{b.pick(r)} * 1.0")
    b.say(f"for part in {layers}:", f"    {value} = part({value}){r.choice(['', '.tanh()', ' + ' + value])}")


@feature()
def weight_normed(b: Block, r: Random) -> None:
    how = r.choice(["weight_norm({})", "spectral_norm({})", 'register_parametrization({}, "weight", Halved())'])
    module = "parametrize" if "register" in how else "parametrizations"
    b.let(f"{b.attribute('layer', module + '.' + how.format(r.choice(b.domain.layers)))}({b.pick(r)})")


@feature()
def hooked(b: Block, r: Random) -> None:
    name = b.layer(r)
    hook = r.choice(["forward_hook(scale_output)", "forward_pre_hook(shift_input)", "forward_hook(count_calls)"])
    b.init.append(f"{name}.register_{hook}")
    b.let(f"{b.attribute('act', r.choice(ACTIVATIONS))}({name}({b.pick(r)}))")


@feature()
def tied(b: Block, r: Random) -> None:
    kind = r.choice(b.domain.layers[:2])
    first, second = b.attribute("layer", kind), b.attribute("layer", kind)
    b.init.append(f"{second}.weight = {first}.weight")
    b.let(f"{second}(F.relu({first}({b.pick(r)})))")


@feature()
def table(b: Block, r: Random) -> None:
    if b.domain.shape != "5, 8":
        layer(b, r)
        return
    tables = b.attribute("table", r.choice(["nn.Embedding(9, 8)", "Positions(9, 8)"]))
    value = b.pick(r)
    b.let(f"{value} + {tables}(torch.arange({value}.shape[1], device={value}.device))")


@feature(1)
def attention_module(b: Block, r: Random) -> None:
    if b.domain.shape != "5, 8":
        matmul(b, r)
        return
    attend, value = b.attribute("attend", "nn.MultiheadAttention(8, 2, batch_first=True)"), b.pick(r)
    b.let(f"{value} + {attend}({value}, {value}, {value}, need_weights=False)[0]")


@feature(1)
def recurrent(b: Block, r: Random) -> None:
    if b.domain.shape != "5, 8":
        layer_norm_act(b, r)
        return
    kind = r.choice(["nn.GRU(8, 8, batch_first=True)", "nn.LSTM(8, 8, batch_first=True)"])
    b.let(f"{b.attribute('rnn', kind)}({b.pick(r)})[0]")


@feature()
def frozen_norm(b: Block, r: Random) -> None:
    if b.domain.norms[0].startswith("nn.LayerNorm"):
        layer_norm_act(b, r)
        return
    norm = b.attribute("norm", b.domain.norms[0])
    b.let(f"{norm}({b.layer(r)}({b.pick(r)}))")
    b.init.append(f"{norm}.running_mean.fill_(0.1)")
    b.methods += ["def train(self, mode=True):", "    super().train(mode)", f"    {norm}.eval()", "    return self"]


@feature(1)
def frozen_layer(b: Block, r: Random) -> None:
    name = b.layer(r)
    b.init.append(f"{name}.requires_grad_(False)")
    b.let(f"{name}({b.pick(r)})")


# Operators


@feature(3)
def function_act(b: Block, r: Random) -> None:
    how = r.choice(
        ["F.relu({})", "F.gelu({})", "F.silu({})", "torch.tanh({})", "{}.sigmoid()", "F.relu6({})", "{}.clamp(-1, 1)"]
        + ["F.softmax({}, -1)", "F.leaky_relu({}, 0.1)", "F.hardswish({})", "F.normalize({}, dim=1)", "{}.abs().sqrt()"]
    )
    if "sqrt" in how:
        how = "({}.abs() + 0.1).sqrt()"
    b.let(how.format(b.pick(r)))


@feature(3)
def arithmetic(b: Block, r: Random) -> None:
    how = r.choice(
        ["{0} + {1}", "{0} * torch.tanh({1})", "{0} - 0.5 * {1}", "torch.add({0}, {1}, alpha=0.5)", "{0} * 0.7"]
        + ["torch.mul({0}, torch.sigmoid({1}))", "0.5 - {0}", "{0} / 2.0", "torch.maximum({0}, {1})", "-{0}"]
        + ["torch.lerp({0}, {1}, 0.3)", "sum([{0}, {1}])", "{0} / (1.0 + {1}.abs())"]
    )
    b.let(how.format(b.pick(r), b.pick(r)))


@feature(3)
def residual(b: Block, r: Random) -> None:
    value = b.pick(r)
    b.let(f"{b.attribute('act', r.choice(ACTIVATIONS))}({value} + {b.layer(r)}({value}))")


@feature()
def concatenate(b: Block, r: Random) -> None:
    axis = r.choice([b.domain.axis, b.domain.axis - len(b.domain.shape.split(",")) - 1])
    narrow = b.layer(r, b.domain.narrowing)
    b.let(f"{narrow}(torch.cat([{b.pick(r)}, {b.pick(r)}], {axis}))")


@feature()
def chunks(b: Block, r: Random) -> None:
    value, axis = b.pick(r), b.domain.axis
    one, other = b.new("p"), b.new("p")
    b.say(f"{one}, {other} = {value}.chunk(2, {axis})")
    b.let(f"torch.cat([{r.choice(['F.relu({})', '{}', '{} * 0.5']).format(other)}, {one}], dim={axis})")


@feature()
def matmul(b: Block, r: Random) -> None:
    query, key = b.pick(r), b.pick(r)
    if b.domain.shape == "4, 6, 6":
        b.let(f"({query} @ F.softmax({key}.transpose(-2, -1), -1))")
        return
    transposed = f"{key}.transpose(0, 1)" if b.domain.shape == "8" else f"{key}.transpose(1, 2)"
    scores = b.new("scores")
    b.say(f"{scores} = torch.softmax({query} @ {transposed} * 0.3, dim=-1)")
    b.let(f"{scores} @ {b.pick(r)}" if r.random() < 0.5 else f"torch.matmul({scores}, {b.layer(r)}({key}))")


@feature(1)
def fused_attention(b: Block, r: Random) -> None:
    if b.domain.shape != "5, 8":
        mean_gate(b, r)
        return
    heads = [f"{b.layer(r)}({b.pick(r)})" for _ in range(3)]
    split = ".view({0}.shape[0], {0}.shape[1], 2, 4).transpose(1, 2)".format(b.pick(r))
    name = b.new("heads")
    b.say(f"{name} = F.scaled_dot_product_attention(" + ", ".join(f"({h}){split}" for h in heads) + ")")
    b.let(f"{name}.transpose(1, 2).flatten(2)")


@feature()
def mean_gate(b: Block, r: Random) -> None:
    value = b.pick(r)
    b.let(f"{value} * torch.sigmoid({_mean(b, value)})")


@feature()
def resize(b: Block, r: Random) -> None:
    value = b.pick(r)
    if b.domain.shape != "4, 6, 6":
        b.let(f"{value}.flip(1)")
        return
    down = r.choice(
        ["F.avg_pool2d({}, 2)", "F.max_pool2d({}, 2)", "F.adaptive_avg_pool2d({}, 3)", "{}[:, :, ::2, ::2]"]
    )
    how = r.choice(["size={0}.shape[-2:]", "scale_factor=2", "size=(6, 6), mode='bilinear', align_corners=False"])
    b.let(f"F.interpolate({down.format(value)}, {how.format(value)})")


@feature(3)
def function_weight(b: Block, r: Random) -> None:
    value = b.pick(r)
    if b.domain.shape == "4, 6, 6":
        weight = b.attribute("w", "nn.Parameter(torch.randn(4, 4, 3, 3) * 0.2)")
        b.let(f"F.conv2d({value}, {weight}, padding=1)")
        return
    weight = b.attribute("w", "nn.Parameter(torch.randn(8, 8) * 0.3)")
    bias = b.attribute("bias", "nn.Parameter(torch.zeros(8))")
    how = ["F.linear({0}, {1}, {2})", "F.linear({0}, {1})", "{0} @ {1}", "torch.matmul({0}, {1}.t()) + {2}"]
    b.let(r.choice(how).format(value, weight, bias))


@feature(1)
def layer_weight_read(b: Block, r: Random) -> None:
    name, value = b.layer(r, b.domain.layers[0]), b.pick(r)
    if b.domain.shape == "4, 6, 6":
        b.let(f"F.conv2d({value}, {name}.weight, {name}.bias, padding=1)")
        return
    b.let(f"F.linear({name}({value}), {name}.weight)")


@feature(1)
def added_parameter(b: Block, r: Random) -> None:
    b.let(f"{b.pick(r)} + {b.attribute('pos', f'nn.Parameter(torch.randn({b.domain.shape}) * 0.1)')}")


@feature(1)
def function_norm(b: Block, r: Random) -> None:
    if b.domain.norms[0].startswith("nn.LayerNorm"):
        b.let(f"F.layer_norm({b.pick(r)}, (8,))")
        return
    n = b.attribute("norm", b.domain.norms[0])
    b.let(
        f"F.batch_norm({b.pick(r)}, {n}.running_mean, {n}.running_var, {n}.weight, {n}.bias, self.training, 0.1, 1e-5)"
    )


@feature()
def constants(b: Block, r: Random) -> None:
    value = b.pick(r)
    how = ["torch.zeros_like({0})", "torch.ones({0}.shape)", "torch.arange({0}.shape[-1]) * 0.1", "torch.tensor(0.5)"]
    how += ["torch.linspace(0, 1, {0}.size(-1))", "{0}.new_ones({0}.shape[-1])", "torch.full_like({0}, 0.3)"]
    b.let(f"{value} + {r.choice(how).format(value)}")


@feature()
def reshapes(b: Block, r: Random) -> None:
    value = b.pick(r)
    how = ["{0}.flatten(1).view({0}.shape)", "{0}.reshape({0}.shape[0], -1).reshape_as({0})", "{0}.view_as({0}) * 1.0"]
    how += ["{0}.unsqueeze(0).squeeze(0)", "{0}.contiguous().view(*{0}.size())", "{0}.transpose(0, 1).transpose(0, 1)"]
    b.let(f"{r.choice(how).format(value)}")


@feature(1)
def sign_where(b: Block, r: Random) -> None:
    value = b.pick(r)
    b.let(f"torch.where({value} > 0, {value}, 0.2 * {b.pick(r)})")


@feature(1)
def without_gradient(b: Block, r: Random) -> None:
    value, name = b.pick(r), b.new("stat")
    b.say("with torch.no_grad():", f"    {name} = {_mean(b, value)}")
    b.let(f"{value} - {r.choice(['', '0.5 * '])}{name}")


@feature(1)
def autocast(b: Block, r: Random) -> None:
    name = b.new("half")
    b.say('with torch.autocast("cpu", dtype=torch.bfloat16):', f"    {name} = {b.layer(r)}({b.pick(r)})")
    b.let(f"{name}.float()")


@feature(1)
def gradient_asked(b: Block, r: Random) -> None:
    value = b.pick(r)
    b.let(f"{value} * 0.9 if {r.choice(['torch.is_grad_enabled()', f'{value}.requires_grad'])} else {value} + 0.1")


@feature(1)
def closure(b: Block, r: Random) -> None:
    name = b.new("helper")
    b.say(f"def {name}(t, *, gain=0.5):", f"    return F.relu({b.layer(r)}(t)) * gain")
    b.let(f"{name}({b.pick(r)})" if r.random() < 0.5 else f"sum({name}(t) for t in ({b.pick(r)}, {b.pick(r)}))")


# Written in place


def _fresh(b: Block, r: Random) -> str:
    """A value of its own that no backward needs as it is, or, at times, any value at hand."""
    if r.random() < 0.35:
        return b.pick(r)
    if r.random() < 0.4:
        return b.let(f"{b.layer(r)}({b.pick(r)})")
    return b.let(r.choice(["{0} + {1}", "{0} * 1.0", "{0} - 0.5 * {1}"]).format(b.pick(r), b.pick(r)))


@feature(3)
def in_place(b: Block, r: Random) -> None:
    target, other = _fresh(b, r), b.pick(r)
    how = ["{0}.relu_()", "{0}.add_({1})", "{0} += {1}", "{0} *= 0.5", "{0}.mul_(0.5)", "F.relu({0}, inplace=True)"]
    how += ["{0} -= 0.1", "{0}.clamp_(-2.0, 2.0)", "{0}.copy_({1})", "F.dropout({0}, 0.2, self.training, inplace=True)"]
    b.say(r.choice(how).format(target, other))


@feature()
def in_place_and_kept(b: Block, r: Random) -> None:
    target = _fresh(b, r)
    how = ["{0}.add_(0.5)", "{0}.relu_()", "F.dropout({0}, 0.3, self.training, True)", "F.hardtanh_({0}, -1.0, 1.0)"]
    b.let(r.choice(how).format(target))


@feature()
def view_written(b: Block, r: Random) -> None:
    target, view = _fresh(b, r), b.new("view")
    how = ["{0}[:, :2]", "{0}.view({0}.shape)", "{0}.transpose(0, 1)", "{0}.flatten(1)", "{0}[0]", "{0}.detach()"]
    b.say(f"{view} = {r.choice(how).format(target)}", f"{view}{r.choice(['.mul_(0.5)', ' += 0.3', '.relu_()'])}")


@feature()
def item_set(b: Block, r: Random) -> None:
    target = _fresh(b, r)
    b.say(f"{target}{r.choice(['[:, 0] = 0.0', '[:, :2] += 0.5', '[0] *= 0.5', '[..., 1] = 1.0'])}")


@feature(1)
def masked_fill_(b: Block, r: Random) -> None:
    target = _fresh(b, r)
    b.say(f"{target}.masked_fill_({target} > 1.5, 0.0)")


@feature(1)
def input_written(b: Block, r: Random) -> None:
    b.say(f"{b.outside}{r.choice(['.mul_(0.9)', ' += 0.1', '.relu_()'])}")


@feature()
def act_in_place_read_later(b: Block, r: Random) -> None:
    value = b.let(f"{b.layer(r)}({b.pick(r)})")
    act = b.attribute("act", r.choice(["nn.ReLU(inplace=True)", "nn.Dropout(0.2, inplace=True)", "nn.ReLU6(True)"]))
    b.let(f"{act}({value}) + 0.5 * {value}")


# Flags read from self


@feature(3)
def flag(b: Block, r: Random) -> None:
    value = b.pick(r)
    kind = r.choice(["bool", "float", "str", "int", "none", "dict"])
    if kind == "bool":
        name = b.flag("use", r.choice(["True", "False"]), "not")
        result = b.let(f"{value} * 1.0")
        b.say(f"if {name}:", f"    {result} = F.relu({result}) + 0.1")
    elif kind == "float":
        b.let(f"{value} * {b.flag('gain', '0.8', '0.3')}")
    elif kind == "str":
        name = b.flag("mode", '"relu"', '"tanh"')
        b.let(f'F.relu({value}) if {name} == "relu" else torch.tanh({value})')
    elif kind == "int":
        name, result = b.flag("steps", "1", "3"), b.let(f"{value} * 1.0")
        b.say(f"for _ in range({name}):", f"    {result} = 0.7 * {result} + 0.1")
    elif kind == "none":
        name = b.flag("limit", "None", "0.5")
        b.let(f"{value} if {name} is None else {value}.clamp(-{name}, {name})")
    else:
        acts = b.attribute("acts", 'nn.ModuleDict({"relu": nn.ReLU(), "tanh": nn.Tanh()})')
        name = b.flag("mode", '"tanh"', '"relu"')
        b.let(f"{acts}[{name}]({value})")


@feature()
def flag_early(b: Block, r: Random) -> None:
    name, value = b.flag("enabled", "True", "False"), b.pick(r)
    b.say(f"if not {name}:")
    b.finish(value, value, "    ")


@feature()
def shape_branch(b: Block, r: Random) -> None:
    value = b.pick(r)
    test = r.choice(["{0}.shape[0] > 2", "{0}.ndim > 3", "len({0}) == 3", "{0}.shape[-1] % 2 == 0", "{0}.dim() == 2"])
    b.let(f"F.relu({value}) if {test.format(value)} else {value} * 0.5")


@feature(1)
def python_checks(b: Block, r: Random) -> None:
    value = b.pick(r)
    how = ["assert {0}.shape[{1}] == {2}", "assert isinstance({0}, torch.Tensor)", "if not {0}.is_floating_point():"]
    line = r.choice(how).format(value, b.domain.axis, b.domain.channels)
    b.say(line, *(["    raise TypeError"] if line.startswith("if") else []))
    b.let(f"{value} + 0.1")


@feature(1)
def data_branch(b: Block, r: Random) -> None:
    value = b.pick(r)
    test = r.choice(["bool({0}.sum() > 0)", "{0}.detach().mean().item() > 0.0"]).format(value)
    layer_ = b.layer(r)
    b.let(f"{layer_}({value}) if {test} else {layer_}(0.5 * {value})")


# Training and evaluation


@feature(3)
def training_branch(b: Block, r: Random) -> None:
    result = b.let(f"{b.pick(r)} * 1.0")
    line = r.choice(["{0} = F.relu({0})", "{0} = {0} * 0.9 + 0.05", "{0} = {1}({0})", "self.aux = {0}.square().mean()"])
    if line.startswith("self.aux"):
        b.init.append("self.aux = None")
    layer_ = b.layer(r) if "{1}" in line else ""
    b.say("if self.training:", f"    {line.format(result, layer_)}")
    if r.random() < 0.4:
        b.say("else:", f"    {result} = {result} - 0.1")


@feature(3)
def dropout(b: Block, r: Random) -> None:
    kind = b.attribute("drop", r.choice(["nn.Dropout(0.3)", "nn.Dropout(0.2, inplace=True)", "nn.Dropout1d(0.3)"][:2]))
    value = b.pick(r)
    how = [f"{kind}({{0}})", "F.dropout({0}, 0.3, self.training)", "F.dropout({0}, p=0.2, training=self.training)"]
    how += ["F.dropout({0}, 0.2) if self.training else {0}"]
    b.let(f"{r.choice(how).format(value)}{r.choice(['', ' + 0.5 * ' + value])}")


# Random draws


@feature(3)
def layer_drop(b: Block, r: Random) -> None:
    value = b.pick(r)
    draw = r.choice(["random.random()", "torch.rand(1).item()", "np.random.rand()", "random.uniform(0.0, 1.0)"])
    b.let(f"{value} if self.training and {draw} < 0.5 else {value} + {b.layer(r)}({value})")


@feature()
def drop_path(b: Block, r: Random) -> None:
    value, keep = b.pick(r), b.new("keep")
    ones = ", ".join(["1"] * len(b.domain.shape.split(",")))
    b.say(
        f"{keep} = 1.0", "if self.training:", f"    {keep} = (torch.rand({value}.shape[0], {ones}) < 0.7).float() / 0.7"
    )
    b.let(f"{value} + {keep} * {b.layer(r)}({value})")


@feature()
def drawn_always(b: Block, r: Random) -> None:
    value = b.pick(r)
    how = [
        "torch.randn_like({0})",
        "torch.rand({0}.shape)",
        "torch.randn({0}.shape[-1])",
        "torch.bernoulli({0}.sigmoid())",
    ]
    b.let(f"{value} + 0.1 * {r.choice(how).format(value)}")


@feature()
def drawn_item_always(b: Block, r: Random) -> None:
    draw = ["random.random()", "torch.rand(1).item()", "float(np.random.rand())", "random.choice([0.5, 1.0])"]
    b.let(f"{b.pick(r)} * (0.5 + 0.5 * {r.choice(draw)})")


# Written on self


@feature(3)
def attribute_written(b: Block, r: Random) -> None:
    value, name = b.pick(r), b.new("note")
    how = [
        ("None", "self.{1} = {0}.square().mean()"),
        ("None", "self.{1} = {0}.detach()"),
        ("0", "self.{1} += 1"),
        ("[]", "self.{1}.append({0}.shape[0])"),
        ("[]", "self.{1}.append({0}.detach().mean())"),
        ("{}", 'self.{1}["last"] = {0}.detach()'),
        ("(0, 0)", "self.{1} = tuple({0}.shape)"),
        ("None", "self.{1} = self.training"),
    ]
    start, line = r.choice(how)
    b.init.append(f"self.{name} = {start}")
    b.say(line.format(value, name))


@feature()
def counter_read(b: Block, r: Random) -> None:
    name = b.attribute("calls", "0")
    b.say(f"{name} += 1")
    b.let(f"{b.pick(r)} * (1.0 + 0.1 * {r.choice(['{0}', '({0} % 2)']).format(name)})")


@feature(3)
def buffer_written(b: Block, r: Random) -> None:
    value, name = b.pick(r), b.new("stat")
    b.init.append(f'self.register_buffer("{name}", torch.zeros(()))')
    how = ["self.{1}.add_(1)", "self.{1} += 1", "self.{1} = 0.9 * self.{1} + 0.1 * {0}.detach().mean()"]
    how += ["self.{1}.mul_(0.9).add_({0}.detach().mean(), alpha=0.1)", "self.{1}.copy_({0}.detach().abs().max())"]
    line = r.choice(how).format(value, name)
    b.say(*(["if self.training:", f"    {line}"] if r.random() < 0.5 else [line]))


@feature()
def buffer_read(b: Block, r: Random) -> None:
    b.init.append('self.register_buffer("seen", torch.ones(()))')
    value = b.pick(r)
    b.say(r.choice(["self.seen.mul_(0.9)", "self.seen *= 0.8", "self.seen = self.seen * 0.9"]))
    b.let(f"{value} * self.seen")


@feature(1)
def cache(b: Block, r: Random) -> None:
    name, value = b.attribute("cached", "None"), b.pick(r)
    b.say(f"if {name} is None:", f"    {name} = torch.arange({value}.shape[-1]) * 0.1")
    b.let(f"{value} + {name}")


# How a block is called, and what it answers. The first lines of its forward, its signature, its last lines.

ARGUMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mask": ("mask=None", ("if mask is not None:", "    x = x * mask")),
    "gain": ("gain=1.0", ("x = x * gain",)),
    "deep": ("deep=False", ("if deep:", "    x = F.relu(x)")),
    "more": ("*more", ("for other in more:", "    x = x + other")),
    "options": ("**options", ('x = x * options.get("scale", 1.0)',)),
}
"""Name -> (in the signature, what is done with it); in the order of a signature."""
VALUES = {"mask": "mask", "gain": "0.5", "deep": "True"}
"""What an optional argument is given."""
