"""The one table of what QWrapper can wrap: layer [+ batch norm] [+ activation].

`register_pattern(MyConv, LayerPattern(...))` or `register_pattern(MyAct, ActivationPattern())` adds a row.
Modules with several weights have a table of their own, weighted.py.
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
"""Floats in a vector of AVX-512."""

RunLayer = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


def run_with(layer: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The forward of a layer with other tensors where it reads these parameters; its hooks are not called.

    Raises UnsupportedPatternError for a parameter that a property of the class gives, as those of some adapters.

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
        values = place.__dict__  # is read before the parameters are
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
    """Run any layer with another weight and bias, by its own `forward`.

    Bit-identical to the direct call and a little dearer, so the layers of torch have direct rows.
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
    """A layer with a `weight`. `run(layer, x, weight, bias)` is its forward with another weight.

    `batch_norm`: the batch norm that may follow, or None. `transposed`: the weight is stored as
    (in, out / groups, ...), as transposed convolutions do.
    """

    run: RunLayer = run_by_functional_call
    batch_norm: type[nn.Module] | None = None
    transposed: bool = False

    def weight_and_bias(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """The weight of the layer, in the layout that the layer stores."""
        return layer.weight, getattr(layer, "bias", None)

    def channels_first(self, layer: Any, weight: Tensor) -> Tensor:
        """The weight with the output channel on axis 0: what weight quantizers see, for every layer.

        (in, out / groups, ...) becomes (out, in / groups, ...). Its own inverse.
        """
        if not self.transposed:
            return weight
        grouped = weight.view(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)


@checked
@dataclass(frozen=True)
class InputFirstPattern(LayerPattern):
    """A linear layer whose weight is stored as (in, out)."""

    def channels_first(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.t()


@checked
@dataclass(frozen=True)
class OwnForwardPattern(LayerPattern):
    """A layer below one of torch with a forward of its own, around the same product."""

    run: RunLayer = run_own

    def weight_and_bias(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        return product_of(layer)


@checked
@dataclass(frozen=True)
class ActivationPattern:
    """An activation. `clamp=(low, high)` if it is `x.clamp(low, high)`: then a quantizer absorbs it."""

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

    It does so for 1x1 convolutions with stride on inputs in channels_last with fewer channels than a vector holds.
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

OWN_FORWARD: dict[type[nn.Module], OwnForwardPattern] = {
    kind: OwnForwardPattern(batch_norm=row.batch_norm, transposed=row.transposed)
    for kind, row in PATTERNS.items()
    if isinstance(row, LayerPattern) and not isinstance(kind, str)
}
"""Layer of torch -> the row of the classes below it."""

NORM_ACTIVATIONS: dict[str, type[nn.Module]] = {"timm.layers.norm_act.BatchNormAct2d": nn.BatchNorm2d}
"""Modules, by name, that are a batch norm, a `drop` and an activation `act` in one."""


def norm_of(module: nn.Module) -> type[nn.Module] | None:
    """The batch norm class of a module that is one and an activation, if it drops nothing and can be split."""
    kind = type(module)
    norm = NORM_ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}")
    act = getattr(module, "act", None)
    if act is None or type(getattr(module, "drop", None)) is not nn.Identity:
        return None
    return norm if type(act) is nn.Identity or isinstance(row_of(act), ActivationPattern) else None


def split_norm(module: Any) -> nn.Module:
    """The batch norm of a module that is one and an activation; it holds the same tensors."""
    kind = norm_of(module)
    assert kind is not None
    norm = kind.__new__(kind)
    norm.__dict__.update({name: v for name, v in module.__dict__.items() if name != "_modules"}, _modules={})
    return norm


@checked
def register_pattern(kind: type[nn.Module] | str, row: LayerPattern | ActivationPattern | WeightsPattern) -> None:
    """Let a class be quantized. kind: the class, or "module.Class" for one of a package not imported yet.

    `QWrapper` takes a layer with one weight and an activation, `QWeights` a module with several weights. Plans, counts,
    files and the integer reference follow. Raises ConfigError, NameClashError if `kind` has another row already.

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
    """The class whose forward a module runs: parametrizations give it a subclass that changes nothing but weights."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


@contextmanager
def read_quietly(layer: nn.Module) -> Iterator[None]:
    """Reading a weight that a parametrization computes moves nothing: spectral_norm moves its vectors in training."""
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
    """The row of a module's class, or of the nearest class above it whose forward it runs unchanged.

    Or an `OwnForwardPattern` for a class below a layer of torch whose forward is its own and one product; else None.
    """
    row = row_of_type(plain_type(module))
    return None if isinstance(row, OwnForwardPattern) and why_no_layer(module) else row


def why_no_layer(module: nn.Module) -> str:
    """Why a module of a class below a layer of torch is none that can be wrapped; "" for any other module."""
    kind = plain_type(module)
    base = base_of(kind) if isinstance(row_of_type(kind), OwnForwardPattern) else None
    return "" if base is None else why_not_followed(module, base)


def row_of_type(kind: type[nn.Module]) -> LayerPattern | ActivationPattern | None:
    """`row_of` a module of a class, whatever the module's own forward does."""
    if kind not in PATTERNS and f"{kind.__module__}.{kind.__qualname__}" in PATTERNS:
        PATTERNS[kind] = PATTERNS[f"{kind.__module__}.{kind.__qualname__}"]
    if kind not in PATTERNS and stock_of(kind) in PATTERNS:
        PATTERNS[kind] = PATTERNS[stock_of(kind)]
    if kind in PATTERNS:
        return PATTERNS[kind]
    base = base_of(kind)
    return None if base is None else OWN_FORWARD[base]


def stock_type(module: nn.Module) -> type[nn.Module]:
    """The class of torch whose forward the module runs unchanged: its own, or one above it; else its own class.

    A subclass that computes its weight in a property of the class runs otherwise.

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
    """(layer, batch norm, activation), or UnsupportedPatternError."""
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
    # behind a Linear a batch norm may work along another axis than the features
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
