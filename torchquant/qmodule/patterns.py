"""The table of all patterns that QWrapper can wrap: layer [+ batch norm] [+ activation].

`register_pattern(MyConv, LayerPattern(...))` or `register_pattern(MyAct, ActivationPattern())` adds a pattern.
Modules with several weights have a table of their own, in weighted.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from torchquant._arguments import checked
from torchquant._renamed import renamed_names
from torchquant._shown import shown
from torchquant.errors import ConfigError, NameClashError, UnsupportedPatternError
from torchquant.qmodule.own_forward import base_of, product_of, run_own, why_not_followed
from torchquant.qmodule.weighted import WEIGHTED, WeightsPattern, class_name
from torchquant.quantizers_functional._gradient import pass_through
from torchquant.quantizers_functional.bn_fold import channel_view

WIDEST_VECTOR = 16
"""Number of floats in an AVX-512 vector."""

RunLayer = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


def run_with(layer: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a layer with other tensors in place of these parameters; its hooks are not called.

    Raises UnsupportedPatternError for a parameter that is a property of the class, as in some adapters.

    >>> float(run_with(nn.Linear(1, 1, bias=False), {"weight": torch.full((1, 1), 2.0)}, torch.ones(1)))
    2.0
    """
    if parametrize.is_parametrized(layer):  # its class computes the weight, whatever the module has
        return functional_call(layer, dict(tensors), args, kwargs)
    places = []
    for path, tensor in tensors.items():
        owner, _, name = path.rpartition(".")
        place = layer.get_submodule(owner)
        if isinstance(getattr(type(place), name, None), property):
            raise UnsupportedPatternError(
                f"{type(place).__name__} computes its {name} in a property, so that {type(layer).__name__} cannot be "
                f"run with another one. Where it is an adapter, put it on the float model and keep {path!r} float"
            )
        values = place.__dict__  # which Python reads before the parameters
        places.append((values, name, values.get(name)))
        values[name] = tensor
    try:
        return layer.forward(*args, **kwargs)
    finally:
        for values, name, former in places:
            if former is None:
                del values[name]
            else:
                values[name] = former


def run_by_functional_call(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run any layer with another weight and bias through its own `forward`.

    The result is bit-identical to the direct call but a little slower, so torch's own layers have direct patterns.
    """
    own_bias = getattr(layer, "bias", None)
    parameters = {"weight": weight}
    if own_bias is not None and bias is not None:
        parameters["bias"] = bias
    y: Tensor = run_with(layer, parameters, x)
    return y if own_bias is not None or bias is None else y + channel_view(bias, y.ndim)


@checked
@dataclass(frozen=True)
class LayerPattern:
    """The pattern of a layer with a `weight`. `run(layer, x, weight, bias)` is its forward with another weight.

    `batch_norm`: the batch norm that may follow, or None. `transposed`: the weight is stored as
    (in, out / groups, ...), as transposed convolutions do.
    """

    run: RunLayer = run_by_functional_call
    batch_norm: type[nn.Module] | None = None
    transposed: bool = False

    @property
    def is_repeatable(self) -> bool:
        """Whether `run` is known to compute the same every time: a forward of another class may draw numbers."""
        return self.run in REPEATABLE

    def weight_and_bias(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Return the weight of the layer, in the layout in which the layer stores it, and its bias."""
        return layer.weight, getattr(layer, "bias", None)

    def channels_first(self, layer: Any, weight: Tensor) -> Tensor:
        """Move the output channel of the weight to axis 0, the layout that weight quantizers get for every layer.

        (in, out / groups, ...) becomes (out, in / groups, ...). The operation is its own inverse.
        """
        if not self.transposed:
            return weight
        grouped = weight.view(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)


@checked
@dataclass(frozen=True)
class InputFirstPattern(LayerPattern):
    """The pattern of a linear layer whose weight is stored as (in, out)."""

    def channels_first(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.t()


@checked
@dataclass(frozen=True)
class OwnForwardPattern(LayerPattern):
    """The pattern of a subclass of a torch layer with a custom forward around the same product."""

    run: RunLayer = run_own

    def weight_and_bias(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        return product_of(layer)


@checked
@dataclass(frozen=True)
class ActivationPattern:
    """The pattern of an activation. `clamp=(low, high)` if it is `x.clamp(low, high)`: then a quantizer absorbs it."""

    clamp: tuple[float | None, float | None] | None = None


def _run_linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _run_conv(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _is_hit_by_onednn_6035(layer, x, weight):
        return layer._conv_forward(x, weight, bias)  # padding modes and dilation included
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim]
    picked: tuple[Any, ...] = (..., *(slice(None, None, step) for step in layer.stride))
    with torch.no_grad():
        value = layer._conv_forward(x, weight, bias)
    return pass_through(conv(x[picked], weight, bias), value)


def _is_hit_by_onednn_6035(layer: Any, x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may write past its memory in the weight gradient (uxlfoundation/oneDNN#6035).

    It does so for strided 1x1 convolutions on channels_last inputs with fewer channels than a vector holds.
    """
    return (
        x.device.type == "cpu"
        and not x.is_contiguous()
        and weight.shape[1] < WIDEST_VECTOR
        and not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and weight.requires_grad
        and all(size == 1 for size in layer.kernel_size)
        and any(step > 1 for step in layer.stride)
        and layer.padding in ("valid", (0,) * len(layer.stride))
        and layer.groups == 1
    )


def _conv_transpose_runner(conv: Callable[..., Tensor]) -> RunLayer:
    def run(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return conv(x, weight, bias, *geometry)

    return run


PATTERNS: dict[type[nn.Module] | str, LayerPattern | ActivationPattern] = {
    nn.Linear: LayerPattern(_run_linear, nn.BatchNorm1d),
    nn.Conv1d: LayerPattern(_run_conv, nn.BatchNorm1d),
    nn.Conv2d: LayerPattern(_run_conv, nn.BatchNorm2d),
    nn.Conv3d: LayerPattern(_run_conv, nn.BatchNorm3d),
    nn.ConvTranspose1d: LayerPattern(_conv_transpose_runner(F.conv_transpose1d), nn.BatchNorm1d, transposed=True),
    nn.ConvTranspose2d: LayerPattern(_conv_transpose_runner(F.conv_transpose2d), nn.BatchNorm2d, transposed=True),
    nn.ConvTranspose3d: LayerPattern(_conv_transpose_runner(F.conv_transpose3d), nn.BatchNorm3d, transposed=True),
    nn.ReLU: ActivationPattern(clamp=(0.0, None)),
    nn.ReLU6: ActivationPattern(clamp=(0.0, 6.0)),
    nn.SiLU: ActivationPattern(),
    nn.Hardswish: ActivationPattern(),
    nn.GELU: ActivationPattern(),
    nn.Sigmoid: ActivationPattern(),
    nn.LeakyReLU: ActivationPattern(),
    nn.PReLU: ActivationPattern(),
    nn.ELU: ActivationPattern(),
    nn.Hardsigmoid: ActivationPattern(),
    nn.Hardtanh: ActivationPattern(),
    nn.Mish: ActivationPattern(),
    nn.Tanh: ActivationPattern(),
}

REPEATABLE = {row.run for row in PATTERNS.values() if isinstance(row, LayerPattern)}
"""Forwards of torch's layers, which compute the same every time."""

OWN_FORWARD: dict[type[nn.Module], OwnForwardPattern] = {
    kind: OwnForwardPattern(batch_norm=row.batch_norm, transposed=row.transposed)
    for kind, row in PATTERNS.items()
    if isinstance(row, LayerPattern) and not isinstance(kind, str)
}
"""Torch layer -> the pattern of its subclasses."""

NORM_ACTIVATIONS: dict[str, type[nn.Module]] = {"timm.layers.norm_act.BatchNormAct2d": nn.BatchNorm2d}
"""Modules, by name, that combine a batch norm, a `drop` and an activation `act`."""


def norm_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the batch norm class of a combined batch norm and activation, if it drops nothing and can be split."""
    kind = type(module)
    norm = NORM_ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}")
    act = getattr(module, "act", None)
    if act is None or type(getattr(module, "drop", None)) is not nn.Identity:
        return None
    return norm if type(act) is nn.Identity or isinstance(row_of(act), ActivationPattern) else None


def split_norm(module: Any) -> nn.Module:
    """Return the batch norm of a combined batch norm and activation; it holds the same tensors."""
    kind = norm_of(module)
    assert kind is not None
    norm = kind.__new__(kind)
    norm.__dict__.update({name: v for name, v in module.__dict__.items() if name != "_modules"}, _modules={})
    return norm


@checked
def register_pattern(kind: type[nn.Module] | str, row: LayerPattern | ActivationPattern | WeightsPattern) -> None:
    """Make a class quantizable. kind: the class, or "module.Class" for a class of a package not imported yet.

    `QWrapper` wraps layers with one weight and activations, `QWeights` modules with several weights. Plans, counts,
    files and the integer reference support the class too. Raises ConfigError, NameClashError if `kind` has another
    pattern already.

    >>> class Double(nn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> register_pattern(Double, ActivationPattern())
    """
    if isinstance(kind, str) and not ("." in kind and all(map(str.isidentifier, kind.split(".")))):
        raise ConfigError(
            f"kind must be a class or its name with the module's, 'package.module.Class'; got {shown(kind)}"
        )
    known = PATTERNS.get(kind) or WEIGHTED.get(kind) or row
    if known != row:
        raise NameClashError(f"{kind} already has the row {known}; got {row}")
    if not isinstance(row, WeightsPattern):
        PATTERNS[kind] = row
        return
    if not isinstance(kind, str):
        row.check(kind)
    WEIGHTED[kind] = row


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Return the class whose forward a module runs, without the subclass that a parametrization puts in its place."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


@contextmanager
def read_quietly(layer: nn.Module) -> Iterator[None]:
    """Keep reads of a parametrized weight free of side effects: spectral_norm updates its vectors in training mode."""
    parts = list(layer.modules()) if parametrize.is_parametrized(layer) else []
    modes = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def row_of(module: nn.Module) -> LayerPattern | ActivationPattern | None:
    """Return the pattern of a module's class, or of the nearest base class whose forward it runs unchanged.

    A subclass of a torch layer with a custom forward around one product gets an `OwnForwardPattern`; others get None.
    """
    row = row_of_type(plain_type(module))
    return None if isinstance(row, OwnForwardPattern) and why_no_layer(module) else row


def why_no_layer(module: nn.Module) -> str:
    """Say why a module of a subclass of a torch layer cannot be wrapped; "" for any other module."""
    kind = plain_type(module)
    base = base_of(kind) if isinstance(row_of_type(kind), OwnForwardPattern) else None
    return "" if base is None else why_not_followed(module, base)


def row_of_type(kind: type[nn.Module]) -> LayerPattern | ActivationPattern | None:
    """Return the pattern of `row_of` for a class, without a check of the module's own forward."""
    if kind not in PATTERNS and f"{kind.__module__}.{kind.__qualname__}" in PATTERNS:
        PATTERNS[kind] = PATTERNS[f"{kind.__module__}.{kind.__qualname__}"]
    if kind not in PATTERNS and stock_of(kind) in PATTERNS:
        PATTERNS[kind] = PATTERNS[stock_of(kind)]
    if kind in PATTERNS:
        return PATTERNS[kind]
    base = base_of(kind)
    return None if base is None else OWN_FORWARD[base]


def stock_type(module: nn.Module) -> type[nn.Module]:
    """Return the torch class whose forward the module runs unchanged: its own, or a base; else its own class.

    A subclass that computes its weight in a property counts as changed.

    >>> class Named(nn.Linear):
    ...     pass
    >>> stock_type(Named(1, 1)).__name__
    'Linear'
    """
    return stock_of(plain_type(module))


def stock_of(kind: type[nn.Module]) -> type[nn.Module]:
    """`stock_type` of a module of a class."""
    names = ("forward", "_conv_forward", "weight", "bias")
    for above in kind.__mro__:
        if above.__module__.startswith("torch.nn.modules.") and above is not nn.Module:
            same = all(getattr(kind, name, None) is getattr(above, name, None) for name in names)
            return above if same else kind
    return kind


def activation_clamp(activation: nn.Module | None) -> tuple[float | None, float | None] | None:
    """(low, high) of an activation that is a clamp and nothing else, else None."""
    row = None if activation is None else row_of(activation)
    return row.clamp if isinstance(row, ActivationPattern) else None


def split_pattern(
    layers: nn.Module | Iterable[nn.Module],
) -> tuple[nn.Module, nn.Module | None, nn.Module | None]:
    """Return (layer, batch norm, activation). Raises UnsupportedPatternError."""
    given = [layers] if isinstance(layers, nn.Module) and not isinstance(layers, nn.Sequential) else list(layers)
    rest = list(given)
    row = row_of(rest[0]) if rest else None
    if not isinstance(row, LayerPattern):
        raise _unsupported(given)
    layer = rest.pop(0)
    bn = rest.pop(0) if rest and row.batch_norm is not None and type(rest[0]) is row.batch_norm else None
    activation = rest.pop(0) if rest and isinstance(row_of(rest[0]), ActivationPattern) else None
    if rest:
        raise _unsupported(given)
    # after a Linear, a batch norm may work along an axis other than the features
    out_channels = None if isinstance(layer, nn.Linear) else getattr(layer, "out_channels", None)
    if bn is not None and out_channels not in (None, bn.num_features):
        raise ConfigError(f"the layer has {out_channels} output channels, its batch norm {bn.num_features}")
    return layer, bn, activation


def _unsupported(given: list[nn.Module]) -> UnsupportedPatternError:
    layer_rows = {class_name(k): r for k, r in PATTERNS.items() if isinstance(r, LayerPattern)}
    layers = ", ".join(f"{k} [+ {class_name(r.batch_norm)}]" if r.batch_norm else k for k, r in layer_rows.items())
    activations = sorted({class_name(k) for k, r in PATTERNS.items() if isinstance(r, ActivationPattern)})
    return UnsupportedPatternError(
        f"QWrapper cannot wrap [{', '.join(type(m).__name__ for m in given)}]. It takes one layer, then its batch "
        f"norm, then an activation, the last two optional. Layers: {layers}. Activations: {', '.join(activations)}. "
        "Another class is added with torchquant.qmodule.register_pattern"
    )


__getattr__ = renamed_names(
    __name__,
    {
        "ActivationRow": "ActivationPattern",
        "InputFirstRow": "InputFirstPattern",
        "LayerRow": "LayerPattern",
        "OwnForwardRow": "OwnForwardPattern",
    },
)
