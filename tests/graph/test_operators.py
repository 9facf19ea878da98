"""The table of operators: each row has each column, or a reason; and what it says holds in integers and in files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torchquant as tq
from torchquant.deploy import certify, export_onnx, to_integer
from torchquant.deploy.integer.operators import HANDLERS, handler_of, register_integer
from torchquant.deploy.onnx import graph as onnx_graph
from torchquant.deploy.onnx import operators as onnx_operators
from torchquant.deploy.onnx.operators import MOVERS, ONNX_FORMS, STOPPING, OnnxForm, register_onnx
from torchquant.errors import ConfigError, NameClashError
from torchquant.graph.operator_table import ROLES, Operator
from torchquant.graph.operators import OPERATORS, register_operator
from torchquant.graph.ops import activation_of, out_of_place
from torchquant.graph.sites import NORM_WHY
from torchquant.graph.trace import traced_graph
from torchquant.plan.rules import RULE_SETS

BUILT_IN = dict(OPERATORS)
"""The rows of the package, without those that examples in docstrings add."""
INT8 = [{"weight": "affine:8,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"}]
N, C, SIZE = 2, 8, 6

# Operator -> one or more uses of it on y (N, C, SIZE, SIZE), the output of a convolution.
SAMPLES: dict[str, dict[str, Callable[[Tensor], Any] | nn.Module]] = {
    "add": {"": lambda y: y + y.flip(2)},
    "sub": {"": lambda y: y - y.flip(2)},
    "mul": {"": lambda y: y * y.flip(2)},
    "div": {"": lambda y: y / y.flip(2).exp()},
    "subtract": {"": lambda y: torch.subtract(y, y.flip(2))},
    "multiply": {"": lambda y: torch.multiply(y, y.flip(2))},
    "divide": {"": lambda y: torch.divide(y, y.flip(2).exp())},
    "baddbmm": {"": lambda y: torch.baddbmm(y[0], y[0], y[1])},
    "matmul": {"": lambda y: y @ y.transpose(2, 3)},
    "addmm": {"": lambda y: torch.addmm(y[0, 0], y[0, 1], y[0, 2])},
    "einsum": {"": lambda y: torch.einsum("ncij,ncik->ncjk", y, y)},
    "attention": {"": lambda y: F.scaled_dot_product_attention(y, y, y)},
    "cat": {"": lambda y: torch.cat([y, y.flip(2)], 1)},
    "stack": {"": lambda y: torch.stack([y, y.flip(2)], 2)},
    "mean": {"": lambda y: y.mean((2, 3))},
    "avg_pool": {"": nn.AvgPool2d(2)},
    "adaptive_avg_pool": {"": lambda y: F.adaptive_avg_pool2d(y, 1)},
    "batch_norm": {"": nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(C))},
    "interpolate": {"": lambda y: F.interpolate(y, scale_factor=2.0, mode="nearest")},
    "relu": {"": lambda y: F.relu(y.flip(2))},
    "relu6": {"": lambda y: F.relu6(y.flip(2))},
    "hardtanh": {"": lambda y: F.hardtanh(y.flip(2), -0.5, 0.5)},
    "clamp": {"": lambda y: torch.clip(y, -0.5, 0.5)},
    "max": {"": lambda y: torch.max(y, 1)[0], "all": lambda y: y.amax((2, 3)), "values": lambda y: y.flip(2).max(3)[0]},
    "max_pool": {"": nn.MaxPool2d(2)},
    "adaptive_max_pool": {"": nn.AdaptiveMaxPool2d(3)},
    "reshape": {"": lambda y: y.reshape_as(y.transpose(1, 2)), "flat": nn.Flatten()},
    "transpose": {"": lambda y: y.swapdims(1, 2), "moved": lambda y: torch.moveaxis(y, 1, 3)},
    "squeeze": {"": lambda y: y.unsqueeze(1)},
    "expand": {"": lambda y: y[:, :1].broadcast_to(N, C, SIZE, SIZE)},
    "repeat": {"": lambda y: y.tile(1, 2, 1, 1), "each": lambda y: y.repeat_interleave(2, 1)},
    "slice": {"": lambda y: y[:, 1:, ::2], "one": lambda y: y.select(2, 3)},
    "gather": {
        "": lambda y: y.gather(1, torch.zeros_like(y, dtype=torch.int64)),
        "rows": lambda y: y.index_select(2, torch.tensor([3, 0, 5])),
    },
    "roll": {"": lambda y: y.roll(2, 1), "back": lambda y: y.flip(1)},
    "split": {"": lambda y: y.chunk(2, 1)[1], "each": lambda y: y.unbind(1)[2]},
    "dropout": {
        "": lambda y: F.dropout3d(y.unsqueeze(2), training=False),
        "1d": nn.Sequential(nn.Flatten(2), nn.Dropout1d()),
    },
    "identity": {"": lambda y: y.detach()},
    "clone": {"": lambda y: torch.clone(y)},
    "to": {"": lambda y: y.type_as(y).float()},
    "pad": {"": nn.ReflectionPad2d(1), "zeros": lambda y: F.pad(y, (1, 1))},
    "pixel_shuffle": {
        "": lambda y: F.pixel_shuffle(y, 2),
        "back": lambda y: F.pixel_unshuffle(y, 2),
        "channels": lambda y: F.channel_shuffle(y, 2),
    },
    "silu": {"": lambda y: F.silu(y)},
    "gelu": {"": lambda y: F.gelu(y)},
    "hardswish": {"": lambda y: F.hardswish(y)},
    "hardsigmoid": {"": lambda y: F.hardsigmoid(y)},
    "leaky_relu": {"": lambda y: F.leaky_relu(y)},
    "elu": {"": lambda y: F.elu(y)},
    "mish": {"": lambda y: F.mish(y)},
    "sigmoid": {"": lambda y: torch.sigmoid(y)},
    "tanh": {"": lambda y: torch.tanh(y)},
    "norm": {"": nn.GroupNorm(2, C), "last": lambda y: F.layer_norm(y, (SIZE,))},
    "linear": {"": nn.Linear(SIZE, 4)},
    "conv2d": {"": nn.Conv2d(C, 4, 3)},
    "conv_transpose2d": {"": nn.ConvTranspose2d(C, 4, 3)},
}
NOT_RUN = {
    "size": "its results are no tensors",
    **dict.fromkeys(("conv1d", "conv3d", "conv_transpose1d", "conv_transpose3d"), "the row of two axes stands for it"),
}
USES = [(name, label) for name, uses in SAMPLES.items() for label in uses]


class Use(nn.Module):
    """One use of an operator, then a product that is a site, so that what came out shows in codes."""

    def __init__(self, use: Callable[[Tensor], Any] | nn.Module) -> None:
        super().__init__()
        self.op = use

    def forward(self, y: Tensor) -> Tensor:
        z = self.op(y)
        return z * z


class Uses(nn.Module):
    def __init__(self, names: Collection[str] = tuple(SAMPLES)) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, C, 1)
        chosen = [(name, label) for name, label in USES if name in names]
        self.uses = nn.ModuleDict({f"{name}_{label}": Use(SAMPLES[name][label]) for name, label in chosen})

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.first(x)
        return [use(y) for use in self.uses.values()]


def quantized(names: Collection[str] = tuple(SAMPLES)) -> tuple[nn.Module, Tensor]:
    """The uses of operators in one network, calibrated, and its example."""
    torch.manual_seed(0)
    x = torch.randn(N, 3, SIZE, SIZE)
    model = tq.quantize(Uses(names).eval(), INT8, x)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    return model, x


@pytest.fixture(scope="module")
def captured() -> dict[str, Any]:
    x = torch.randn(N, 3, SIZE, SIZE)
    return {site.path: site for site in tq.capture(Uses().eval(), x).sites}


@pytest.mark.parametrize("row", BUILT_IN.values(), ids=list(BUILT_IN))
def test_each_row_has_each_column_or_a_reason(row: Operator) -> None:
    assert row.role in ROLES
    assert row.family in BUILT_IN
    assert bool(handler_of(row)) != bool(row.why_float), "an integer form, or a reason why not"
    is_multiplying = row.role == "layer" or row.family in ("matmul", "attention")
    assert (row.macs is not None) == is_multiplying
    form = ONNX_FORMS.get(row.name)
    if row.role != "shape":
        assert form is not None
        assert bool(form.kernels or form.moves) != bool(form.why_float), "an integer form in files, or a reason why not"
        assert form.moves or row.role != "passes"
    assert row.name in SAMPLES or row.name in NOT_RUN


def test_handlers_and_forms_are_of_rows() -> None:
    assert HANDLERS.keys() <= OPERATORS.keys()
    assert ONNX_FORMS.keys() <= OPERATORS.keys()
    kinds = {kind for name in ("int8-ort", "int8-openvino") for rule in RULE_SETS[name] for kind in rule["types"]}
    named = kinds & {row.family for row in BUILT_IN.values()}
    in_integers = {
        row.family for row in BUILT_IN.values() if row.name in ONNX_FORMS and not ONNX_FORMS[row.name].why_float
    }
    assert named <= in_integers


@pytest.mark.parametrize(("name", "label"), USES)
def test_the_role_is_what_a_plan_makes_of_it(name: str, label: str, captured: dict[str, Any]) -> None:
    row, place = BUILT_IN[name], f"uses.{name}_{label}"
    product = captured[[path for path in captured if path.startswith(f"{place}.mul")][-1]]
    own = {path: site for path, site in captured.items() if path.startswith(place) and path != product.path}
    if row.role == "computes":
        site = next(site for site in own.values() if name in site.types)
        assert site.types[0] == name
        assert site.module is not None or site.path.removeprefix(f"{place}.").startswith(row.path)
        assert site.types[-1] == row.family or site.module is not None
        assert product.reads[0].sources == (next(reversed(own)),)
    elif row.role == "passes":
        assert product.reads[0].sources == ("first",)
    elif row.role == "layer":
        assert next(reversed(own.values())).is_layer
    else:
        assert product.reads[0].sources == ()


@torch.no_grad()
def test_the_integer_reference_computes_what_the_model_does() -> None:
    model, x = quantized()
    integer = to_integer(model, x, rounding="exact")
    rows = [OPERATORS.of(found.name) for found in integer.float_operators]
    floats = {row.name for row in rows if row is not None}
    expected = {name for name, row in BUILT_IN.items() if row.why_float and name in SAMPLES}
    assert floats - {"mul"} == expected - {"batch_norm"}  # a product of clamped values; the function is in "norm"
    for (name, label), found, wanted in zip(USES, integer(x), model(x), strict=True):
        apart = (found - wanted).abs()
        assert float(apart.max()) < 0.1 * float(wanted.abs().max()), (name, label)  # a code before may be at a tie
        assert float(apart.mean()) < 0.01 * float(wanted.abs().max()), (name, label)


def test_a_file_computes_what_the_integer_reference_does(tmp_path: Path) -> None:
    in_integers = [name for name in SAMPLES if not ONNX_FORMS[name].why_float and BUILT_IN[name].role != "layer"]
    model, x = quantized(in_integers)
    path = export_onnx(model, tmp_path / "net.onnx", x, verify=False, dynamic_batch=False)
    certificate = certify(model, path, x)
    assert certificate.passed, str(certificate)
    kernels = set(certificate.comparisons[0].kernels)
    assert {"QLinearAdd", "QLinearMul", "QLinearMatMul", "QLinearConcat", "QLinearAveragePool"} <= kernels
    nodes = {node.op_type for node in pytest.importorskip("onnx").load(path).graph.node}
    listed = {node for name in SAMPLES for node in ONNX_FORMS[name].nodes}
    assert nodes - listed <= {"QuantizeLinear", "DequantizeLinear"}


@pytest.mark.parametrize("name", ["matmul", "baddbmm", "addmm", "einsum", "attention"])
def test_multiply_adds_are_those_torch_counts(name: str) -> None:
    (use,) = SAMPLES[name].values()
    y = torch.randn(N, C, SIZE, SIZE)
    plan = tq.QuantPlan.from_rules(INT8, Use(use), y)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        use(y)
    assert plan.coverage is not None
    assert plan.coverage.macs == plan.coverage.quantized_macs
    assert (plan.coverage.macs or 0) * N in range(counter.get_total_flops() // 2, counter.get_total_flops() // 2 + N)


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a test adds go when it ends."""
    for name in ("_rows", "_name_of", "_elsewhere"):
        monkeypatch.setattr(OPERATORS, name, dict(getattr(OPERATORS, name)))


@pytest.fixture
def own_forms() -> Iterator[None]:
    """Forms in files that a test adds go when it ends."""
    tables = (ONNX_FORMS, MOVERS, STOPPING, onnx_operators.EXACT_KERNELS, onnx_operators.TABLE_KERNELS)
    kept = [copy.copy(table) for table in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)  # type: ignore[arg-type]


@pytest.mark.usefixtures("own_table", "own_forms")
def test_what_moves_codes_in_a_file_is_quantized_on_the_same_grid_again() -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    register_operator("mover", "mover", "passes", n_reads=1)
    for moved, written in ((False, ["Mover"]), (True, ["Mover", "QuantizeLinear", "DequantizeLinear"])):
        nodes = [make("DequantizeLinear", ["codes", "scale", "zero"], ["x"]), make("Mover", ["x"], ["y"])]
        proto = onnx.helper.make_model(onnx.helper.make_graph(nodes, "net", [], []))
        if moved:
            register_onnx("mover", OnnxForm(("Mover", "Slice"), moves=True))
        onnx_graph._quantize_behind_moves(proto, onnx)
        assert [node.op_type for node in proto.graph.node[1:]] == written
        assert proto.graph.node[-1].output[0] == "y"
    assert {"Mover", "Slice"} <= MOVERS
    assert {"Split", "Pad", "Mover"} <= STOPPING
    assert "Slice" not in STOPPING  # codes move through a Slice by themselves


@pytest.mark.slow
@pytest.mark.usefixtures("own_table", "own_forms")
def test_behind_an_operator_of_ones_own_layers_compute_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, net = torch.randn(64, 8, 8), nn.Sequential(nn.Linear(8, 8), Use(torch.tril), nn.Linear(8, 8))
    register_operator("tril", "tril", "passes", n_reads=1)
    register_onnx("tril", OnnxForm(("Trilu",), moves=True))
    model = tq.quantize(net.eval(), INT8, x)
    tq.calibrate(model, [x])
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    certificate = certify(model, export_onnx(model, tmp_path / "net.onnx", x), x)
    assert certificate.passed, str(certificate)
    assert "MatMulNBits" not in certificate.comparisons[0].kernels


@pytest.mark.usefixtures("own_table", "own_forms")
def test_forms_are_of_operators_and_stay() -> None:
    with pytest.raises(ConfigError, match="there is no operator 'triangle'; add it with torchquant.graph.register_op"):
        register_onnx("triangle", OnnxForm(("Trilu",)))
    register_onnx("add", ONNX_FORMS["add"])
    with pytest.raises(NameClashError, match="the operator 'add' already has the form .*; got .*Trilu"):
        register_onnx("add", OnnxForm(("Trilu",)))


def halved(x: Tensor) -> Tensor:
    return x / 2 if bool(x.sum() > 0) else x  # no graph can follow this


class Mirrored(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) if bool(x.sum() > 0) else x


class WithOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mirrored, self.last = nn.Linear(4, 4), Mirrored(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mirrored(halved(self.first(x))))


@pytest.mark.usefixtures("own_table")
def test_operators_of_a_user_are_sites_and_pass_values_on() -> None:
    x = torch.randn(2, 4)
    assert [site.path for site in tq.capture(WithOwn(), x).sites] == ["first", "last"]
    tq.graph.register_operator("halved", halved, "computes")
    tq.graph.register_operator("mirrored", Mirrored, "passes")
    captured = tq.capture(WithOwn(), x)
    assert [site.path for site in captured.sites] == ["first", "halved", "last"]
    assert captured.sites[-1].reads[0].sources == ("halved",)
    model = tq.quantize(WithOwn().eval(), [{"types": ["halved"], "output": "affine:8"}], x)
    assert torch.equal(model(x), copy_float(model)(x))


@torch.library.custom_op("torchquant_tests::relu", mutates_args=())
def soft(x: Tensor) -> Tensor:
    """Of somebody's library: named as an operator of torch, but not it."""
    return x.sigmoid()


@pytest.mark.usefixtures("own_table")
def test_an_operator_of_a_library_is_a_site_whichever_overload_is_given() -> None:
    x, net = torch.randn(2, 4), Between(lambda y: soft(y))
    assert OPERATORS.of(soft) is OPERATORS.of(torch.ops.torchquant_tests.relu) is None
    assert [site.path for site in tq.capture(net, x).sites] == ["a", "b"]
    for target in (soft, torch.ops.torchquant_tests.relu, torch.ops.torchquant_tests.relu.default):
        row = register_operator("soft", target, "computes")
        assert OPERATORS.of(soft) is OPERATORS.of(torch.ops.torchquant_tests.relu) is row
    assert [site.path for site in tq.capture(net, x).sites] == ["a", "soft", "b"]
    assert OPERATORS.of(torch.ops.aten.relu) is OPERATORS["relu"]


def copy_float(model: nn.Module) -> nn.Module:
    return model.plan.revert(model)  # type: ignore[no-any-return, union-attr]


@pytest.mark.usefixtures("own_table")
def test_further_targets_of_a_row() -> None:
    row = register_operator("add", [halved, "special_add"])
    assert OPERATORS.of(halved) is row is OPERATORS.of("special_add") is OPERATORS.of(torch.add)
    assert register_operator("add", halved) == row


@pytest.mark.usefixtures("own_table")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("new", torch.tan), ConfigError, "the new operator 'new' needs a role, one of computes, passes"),
        (("new", torch.tan, "moves"), ConfigError, "needs a role, one of computes, .* got 'moves'"),
        (("new one", torch.tan, "passes"), ConfigError, "name must consist of letters"),
        (("new", torch.tan, "passes", 0), ConfigError, "n_reads must be at least 1"),
        (("new", [], "passes"), ConfigError, "targets must be functions"),
        (("new", [3], "passes"), ConfigError, "targets"),
        (
            ("new", "add", "computes"),
            NameClashError,
            "'add' is already a target of the operator 'add' and cannot be one of 'new'",
        ),
        (("new", nn.ReLU, "computes"), NameClashError, "ReLU.* is already a target of the operator 'relu'"),
        (
            ("add", torch.tan, "passes"),
            NameClashError,
            "the operator 'add' is registered with role = 'computes'; got 'passes'",
        ),
    ],
)
def test_what_cannot_be_registered(arguments: Any, error: type[Exception], message: str) -> None:
    before = dict(OPERATORS)
    with pytest.raises(error, match=message):
        register_operator(*arguments)
    assert dict(OPERATORS) == before


def test_a_handler_needs_a_row_and_is_the_only_one() -> None:
    with pytest.raises(ConfigError, match="there is no operator 'tan'; add it with"):
        register_integer("tan")(lambda func, x: x)
    with pytest.raises(NameClashError, match="the operator 'add' has an integer handler"):
        register_integer("add")(lambda func, x: x)


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(4, 4), between, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


@pytest.mark.parametrize(
    ("between", "fused"),
    [
        (lambda y: F.hardtanh(y, -0.5, 0.5), "Hardtanh"),
        (lambda y: torch.relu_(y), "ReLU"),
        (lambda y: y.relu_(), "ReLU"),
        (lambda y: F.leaky_relu(y, 0.1), "LeakyReLU"),
    ],
)
def test_functions_fuse_as_their_modules_do(between: Callable[[Tensor], Tensor], fused: str) -> None:
    site = tq.capture(Between(between), torch.randn(2, 4)).sites[0]
    assert site.fused == (("", fused),)
    assert site.batch_norm is None
    assert site.activation == ("", fused)


@pytest.mark.parametrize(("between", "writes"), [(lambda y: y.relu_(), True), (lambda y: y.relu(), False)])
def test_an_activation_writes_where_its_function_does(between: Callable[[Tensor], Tensor], writes: bool) -> None:
    net = Between(between)
    node = next(node for node in traced_graph(net).nodes if node.op == "call_method")
    assert activation_of(node, net).inplace == writes  # type: ignore[union-attr]
    assert out_of_place(node) == "relu"


@pytest.mark.parametrize(
    "between", [lambda y: torch.max(y, y.flip(1)), lambda y: y.clamp(max=y.mean()), lambda y: y.max(y * 0.5)]
)
def test_what_takes_values_of_two_tensors_lies_on_no_grid_of_either(between: Callable[[Tensor], Tensor]) -> None:
    assert tq.capture(Between(between), torch.randn(2, 4)).sites[-1].reads[0].sources == ()


def test_names_of_modules_in_files_of_before_stay() -> None:
    def forward(y: Tensor) -> Tensor:
        y = torch.multiply(y, y.flip(1)) * torch.einsum("ij,ij->ij", y, y)
        return torch.addmm(y, torch.stack([y, y])[0], torch.subtract(y, 1.0 - y))

    paths = [site.path for site in tq.capture(Between(forward), torch.randn(4, 4)).sites]
    assert paths == ["a", "multiply", "matmul", "mul", "cat", "sub", "subtract", "addmm", "b"]


class PlainNorm(nn.Module):
    """As those of other packages are."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.std()


class Named(nn.LayerNorm):
    pass


@pytest.mark.parametrize(
    ("between", "is_norm"),
    [
        (nn.LayerNorm(4), True),
        (Named(4), True),
        (PlainNorm(), True),
        (lambda y: F.layer_norm(y, (4,)), True),
        (lambda y: F.normalize(y), True),
        (lambda y: y * torch.linalg.vector_norm(y), False),
    ],
)
def test_normalizations_are_told_from_norms(between: Any, is_norm: bool) -> None:
    floats = tq.capture(Between(between), torch.randn(2, 4)).floats
    assert any(left.why == NORM_WHY for left in floats) == is_norm


def test_a_reflected_difference_is_the_other_way_round() -> None:
    class Minus(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return Tensor.__rsub__(a, b)

    model = tq.QOp(Minus(), tq.make_quantizer("affine:8"))
    reads = nn.ModuleList([tq.QOp(nn.Identity(), tq.make_quantizer("affine:8")) for _ in range(2)])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads, self.op = reads, model

        def forward(self, x: Tensor) -> Tensor:
            return self.op(self.reads[0](x), self.reads[1](2 * x))

    net, x = Net(), torch.linspace(-1, 1, 20)
    with torch.no_grad(), tq.qmodule_state(net, tq.QModuleState.CALIBRATION):
        net(x)
    integer = to_integer(net, x)
    assert "__rsub__" not in {found.name for found in integer.float_operators}
    assert (integer(x) - x).abs().max() < 0.05
