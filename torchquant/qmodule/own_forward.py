"""Find the one product in a layer with a custom forward, and run that forward with another weight.

A subclass of a torch layer may pad its input, or compute its weight, before its one convolution or matrix product.
The operands of that product are quantized; the rest of the forward runs as it is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchquant.errors import ConfigError
from torchquant.quantizers_functional._recording import current_recorder

PRODUCTS: dict[type[nn.Module], Any] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
"""Torch layer -> the function that computes its product."""
_NAMES = ("input", "weight", "bias")
_probed: WeakKeyDictionary[nn.Module, tuple[type[nn.Module], str]] = WeakKeyDictionary()


class _AtProducts(TorchFunctionMode):
    """Replaces the calls of `PRODUCTS` in a forward."""

    def product(self, function: Any, given: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the result of the call. `given`: input, weight and bias; then the other arguments."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in PRODUCTS.values():
            return func(*args, **kwargs)
        given = [*args[:3], *(kwargs.pop(name, None) for name in _NAMES[len(args) :])]
        return self.product(func, given, tuple(args[3:]), kwargs)


class _Given(_AtProducts):
    """Gives the product another weight and bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def product(self, function: Any, given: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = current_recorder()
        if recorder is not None:
            recorder.note_input(given[0])
        return function(given[0], self.weight, self.bias, *args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        recorder = current_recorder()
        if recorder is not None and func in _PADS and _pads_with_zeros(*args, **(kwargs or {})):
            recorder.note_zeros_and(args[0], result)
        return result


_PADS = (F.pad, torch._C._nn.pad)


def _pads_with_zeros(x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    return mode == "constant" and not value


class _Taken(_AtProducts):
    """Records the weight and the bias of the product, which is not computed; `result` stands in for its output."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []
        self.weight: Any = None
        self.bias: Any = None
        self.result: Any = None

    def product(self, function: Any, given: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.functions.append(function)
        x, self.weight, self.bias = given
        self.result = x.clone()
        return self.result


class _Read(_AtProducts):
    """Records the product, its input and its geometry, and ends the forward there."""

    def product(self, function: Any, given: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.found = function, given[0], {**dict(zip(_GEOMETRY[function], args, strict=False)), **kwargs}
        raise _ReadError


class _ReadError(Exception):
    pass


_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
_GEOMETRY: dict[Any, tuple[str, ...]] = {
    function: () if kind is nn.Linear else _TRANSPOSED if "Transpose" in kind.__name__ else _CONV
    for kind, function in PRODUCTS.items()
}
"""Product -> the names of its arguments after input, weight and bias, in order."""


def read_of_product(run: Callable[[], object]) -> tuple[Any, Tensor, dict[str, Any]]:
    """Return the product in a layer's forward: its function, its input, and its geometry by name.

    `run` calls the forward, which ends at the product.

    >>> layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    >>> function, x, geometry = read_of_product(lambda: layer(torch.ones(1, 1, 4, 4)))
    >>> function.__name__, x.shape, geometry["padding"]
    ('conv2d', torch.Size([1, 1, 6, 6]), (0, 0))
    """
    read = _Read()
    try:
        with read:
            run()
    except _ReadError:
        pass
    return read.found


class _Watched(TorchFunctionMode):
    """Records the inputs of the products with one weight, and the names of other functions that get it.

    `matrices`: the weight, or those of its matrices that were picked by a number, each with its number; `transposed`:
    those with the inputs before the outputs.
    """

    def __init__(self, weight: Tensor, is_transposed: bool) -> None:
        super().__init__()
        self.weight = weight
        self.matrices: list[tuple[Tensor, int]] = []
        self.transposed: list[tuple[Tensor, int]] = []
        (self.transposed if is_transposed else self.matrices).append((weight, 0))
        self.inputs: dict[int, list[Tensor]] = {}
        self.others: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        if not isinstance(result, Tensor) or all(_number(x, self.matrices + self.transposed) is None for x in given):
            return result
        second = args[1] if len(args) > 1 else None
        kinds = (self.matrices, self.transposed)
        own, other = kinds if _number(args[0], self.matrices) is not None else kinds[::-1]
        number, of_transposed = _number(args[0], own), _number(second, self.transposed)
        if func is Tensor.__getitem__ and args[0] is self.weight and (index := _index(second)) is not None:
            own.append((result, index))
        elif func in _TRANSPOSES and number is not None:
            other.append((result, number))
        elif func is F.linear and (number := _number(second, self.matrices)) is not None:
            self.inputs.setdefault(number, []).append(args[0].detach())
        elif func in _MATMULS and of_transposed is not None:
            self.inputs.setdefault(of_transposed, []).append(args[0].detach())
        else:
            self.others.add(getattr(func, "__name__", str(func)))
        return result


_TRANSPOSES = (torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


def _number(x: Any, known: list[tuple[Tensor, int]]) -> int | None:
    """Return the number of the matrix that x is; None if it is none of them."""
    return next((number for matrix, number in known if matrix is x), None)


def _index(x: Any) -> int | None:
    """Return the index that picks one matrix of a stack; None for any other index."""
    is_one = isinstance(x, int) or (isinstance(x, Tensor) and x.ndim == 0 and x.dtype != torch.bool)
    return int(x) if is_one else None


def inputs_of_products(
    weight: Tensor, run: Callable[[], object], is_transposed: bool = False
) -> dict[int, list[Tensor]]:
    """Return the inputs of all products with a weight, `F.linear(x, weight)` or `x @ weight.T`, while `run` runs.

    `is_transposed`: the weight has its inputs before its outputs, and products are `x @ weight`. A stack of matrices,
    (groups, outputs, inputs), is multiplied as `weight[i]`; the inputs are by that number, 0 for a single matrix.
    Raises ConfigError if the weight is used otherwise too, or not at all.

    >>> x, weight = torch.ones(1, 2), torch.ones(3, 2)
    >>> inputs_of_products(weight, lambda: torch.tanh(x @ weight.T))
    {0: [tensor([[1., 1.]])]}
    """
    watched = _Watched(weight, is_transposed)
    with watched:
        run()
    if watched.others or not watched.inputs:
        used = f"goes into {', '.join(sorted(watched.others))}" if watched.others else "is not used"
        followed = "x @ weight or F.linear(x, weight.T)" if is_transposed else "F.linear(x, weight) or x @ weight.T"
        raise ConfigError(f"its weight {used}, where products {followed} can be followed")
    return watched.inputs


def run_own(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run the forward of the layer with this weight and bias in its product."""
    with _Given(weight, bias):
        y: Tensor = layer.forward(x)
    return y


def product_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias of the product in the layer's forward, with their gradients.

    >>> class Halved(nn.Linear):
    ...     def forward(self, x):
    ...         return F.linear(x, self.weight / 2, self.bias)
    >>> layer = Halved(2, 1)
    >>> bool((product_of(layer)[0] == layer.weight / 2).all())
    True
    """
    taken = _Taken()
    with taken:
        layer.forward(_sample(layer))
    return taken.weight, taken.bias


def _sample(layer: Any, more: int = 0) -> Tensor:
    """Make an input for the layer, `more` larger than one window; its values do not matter."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return torch.zeros((1 + more, layer.in_features), dtype=weight.dtype, device=weight.device)
    sizes = [d * (k - 1) + 1 + more for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return torch.zeros((1, layer.in_channels, *sizes), dtype=weight.dtype, device=weight.device)


def base_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the torch layer that a class outside of torch derives from, None for other classes."""
    if kind.__module__.startswith("torch.nn."):
        return None
    return next((above for above in kind.__mro__ if above in PRODUCTS), None)


def why_not_followed(layer: nn.Module, base: type[nn.Module]) -> str:
    """Say why the forward of a layer of a subclass of `base` is not one product of its own weight; "" if it is."""
    known = _probed.get(layer)
    if known is None or known[0] is not type(layer):
        known = _probed[layer] = type(layer), _probe(layer, base)
    return known[1]


@torch.no_grad()
def _probe(layer: nn.Module, base: type[nn.Module]) -> str:
    try:
        twin = copy.deepcopy(layer, {id(t): t.detach().clone() for t in _computed_by_hooks(layer)})
        seen = []
        for more, training in enumerate((False, True, True)):
            for module in twin.modules():
                module.training = training
            before, random = _insides(twin), torch.get_rng_state()
            sample, taken = _sample(twin, more).add_(more), _Taken()
            with taken:
                result = twin.forward(sample)
            if len(taken.functions) != 1 or taken.functions[0] is not PRODUCTS[base]:
                return f"it has {len(taken.functions)} products, not one {PRODUCTS[base].__name__}"
            if result is not taken.result or result._version:
                return f"it computes on behind its {PRODUCTS[base].__name__}"
            if not torch.equal(random, torch.get_rng_state()):
                torch.set_rng_state(random)
                return "it draws random numbers"
            if _insides(twin) != before or not _same(layer.state_dict(), twin.state_dict()):
                return "it changes what hangs on it"
            seen.append({"weight": taken.weight, "bias": taken.bias})
        if not all(_same(seen[0], other) for other in seen[1:]):
            return "its weight depends on its input, on chance or on the mode"
    except Exception as error:  # whatever a forward raises
        return f"it does not run on a sample: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return ""


def _computed_by_hooks(layer: nn.Module) -> list[Tensor]:
    """List the non-leaf tensors, which torch refuses to copy."""
    values = (value for module in layer.modules() for value in vars(module).values())
    return [value for value in values if isinstance(value, Tensor) and value.grad_fn is not None]


def _insides(layer: nn.Module) -> list[dict[str, int]]:
    """Return the identities of the parameters, buffers and attributes of the modules."""
    return [
        {name: id(value) for store in (vars(m), m._parameters, m._buffers) for name, value in store.items()}
        for m in layer.modules()
    ]


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return x is y
        return x.shape == y.shape and (x.is_meta or bool(x.eq(y).logical_or(x.isnan() & y.isnan()).all()))

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
