"""Make the lowered form of a model: every QModule is replaced by a module that holds codes instead of quantizers.

The form is an ordinary module: in torch it computes what the file will compute; inside `with integer_run(...)` it
computes on integers.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchquant._modes import has_hooks
from torchquant._shown import running
from torchquant.deploy.integer.context import IntegerRun, active_run, integer_run
from torchquant.deploy.integer.operators import IntegerTensor  # importing it registers the handlers of operators
from torchquant.deploy.integer.values import Codes
from torchquant.deploy.lowering.hooks import refuse_hooks
from torchquant.deploy.lowering.qdq import (
    QuantizeDequantize,
    StoredBias,
    StoredWeight,
    acts_site,
    as_nodes,
    node,
)
from torchquant.deploy.lowering.stand_in import LeftOut, PassedOn, StandIn, leave_out
from torchquant.deploy.lowering.stored_weights import Stored, stored_weight, without_weight
from torchquant.deploy.lowering.weights_form import DeployWeights
from torchquant.errors import ExportError
from torchquant.graph.operators import OPERATORS
from torchquant.graph.ops import operator_of_module
from torchquant.graph.recording import call_with
from torchquant.graph.traced import reseal
from torchquant.qmodule import QModule, QOp, QWeights, QWrapper
from torchquant.qmodule.attention import QAttention, attention
from torchquant.qmodule.bn_folding import running_bias, running_factor
from torchquant.qmodule.fused_part import FusedPart
from torchquant.qmodule.input_slots import beside
from torchquant.qmodule.patterns import activation_clamp, stock_type


class DeployLayer(StandIn):
    """Computes what a QWrapper computes in QUANT_EVAL, with its weight stored as codes. `path` names it in messages.

    `weight`: the stored weight, or the layer's own where it stays float. `sum_bias`: the bias that the layer runs with.
    """

    runs: ClassVar[dict[str, str]] = {
        "the wrapper": "",
        "its layer": "layer",
        "its batch norm": "bn",
        "its activation": "activation",
    }
    weight: Stored

    def __init__(self, wrapper: QWrapper, path: str, keep_signed: bool = False) -> None:
        super().__init__(path, wrapper.held)
        self.bn = wrapper.bn
        self.activation = wrapper.activation
        self.input = acts_site(wrapper.input_quantizer, f"{path}.input", keep_signed)
        self.output = acts_site(wrapper.acts_quantizer, f"{path}.output", keep_signed)
        self.activation = _left_of(self.activation, self.output)
        self.preactivation = acts_site(wrapper.preactivation_quantizer, f"{path}.preactivation", keep_signed)
        self.layer = wrapper.layer
        self.row = wrapper.row
        self.input_transform = wrapper.input_transform
        self.low_rank = wrapper.low_rank
        self.has_codes = wrapper.weight_quantizer is not None
        self.sum_bias: nn.Parameter | None = None
        self.stored_bias = nn.ModuleList()  # one, or one per call where the inputs of the calls have different scales
        self.calls = 0
        self.input_scales: list[Tensor | None] = []
        self.is_settled = False
        if wrapper.weight_quantizer is not None:
            self.layer = without_weight(wrapper.layer)
            self.weight, self.bn = stored_weight(wrapper, wrapper.weight_quantizer, self.layer, path, keep_signed)
            bias = wrapper.bias_in_use
            if wrapper.fold_mode is not None:
                bias = running_bias(wrapper.bn, bias)
            if bias is not None and wrapper.bias_quantizer is not None:
                bias = wrapper.bias_quantizer(bias)
            if wrapper.fold_mode is None and wrapper.bn is not None and self.bn is None:
                bias = running_bias(wrapper.bn, bias)
                if self.low_rank is not None:
                    self.low_rank.up.mul_(running_factor(wrapper.bn)[:, None])
            self.sum_bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor, *, fused: bool = True) -> Tensor:
        if self.input_transform is not None:
            x = self.input_transform(in_float("input_transform", x))
        real = x
        x = self.input(x)
        run = active_run()
        known = x.codes if isinstance(x, IntegerTensor) else None
        if known is not None and not self.is_settled and self._in_steps and self.sum_bias is not None:
            self.weight.fit_bias_range(self.sum_bias, known.scale)
        if run is not None and run.checking:
            run.site = self.path
            self.input_scales.append(None if known is None else known.scale)
        y = self.row.run(self.layer, x, self.weight(), self._bias(known)) if self.has_codes else self.layer(x)
        if self.low_rank is not None:
            real = real.real() if isinstance(real, IntegerTensor) else real
            y = in_float("low_rank", y) + beside(self.low_rank, self.row, self.layer, real)
        y = self.preactivation(y if self.bn is None else self.bn(y))
        return self.output(y if self.activation is None else self.activation(y))

    def _bias(self, known: Codes | None) -> Tensor | None:
        """Return the bias as the file has it; `known`: the incoming codes, in an integer run."""
        if known is not None and self.sum_bias is not None and self._has_one_scale:
            return self._on_grid_of(known.scale)()  # type: ignore[no-any-return]
        if active_run() is not None or not len(self.stored_bias):
            return self.sum_bias
        call, self.calls = self.calls, (self.calls + 1) % len(self.stored_bias)
        bias: Tensor = self.stored_bias[call]()
        return bias

    @property
    def _has_one_scale(self) -> bool:
        """Tell whether the sums of products have one scale per tensor or output channel."""
        return self._in_steps and len(self.weight.terms) == 1

    @property
    def _in_steps(self) -> bool:
        return self.has_codes and isinstance(self.weight, StoredWeight)

    def _on_grid_of(self, input_scale: Tensor) -> StoredBias:
        """Return the bias in steps of the sums that it is added to."""
        return StoredBias(self.sum_bias, input_scale * self.weight.terms[0][0], self.path)  # type: ignore[arg-type]

    def fix_bias_scales(self) -> None:
        """Put the bias on the grid of the sums it is added to, where the inputs are on a grid."""
        scales = [s for s in self.input_scales if s is not None]
        every_call = len(scales) == len(self.input_scales)
        self.input_scales, self.is_settled = [], True
        if self.sum_bias is None or not self._has_one_scale or not scales or not every_call:
            return
        same = all(torch.equal(scale, scales[0]) for scale in scales)
        for scale in scales[:1] if same else scales:
            self.stored_bias.append(self._on_grid_of(scale))


def in_float(what: str, x: Tensor) -> Tensor:
    """Return the real numbers of x for a computation in float32, which an integer run notes."""
    run = active_run()
    if run is not None:
        run.note_float(what)
    return x.real() if isinstance(x, IntegerTensor) else x


class DeployOp(StandIn):
    """Computes what a QOp computes in QUANT_EVAL."""

    stands_for: ClassVar[str] = "op"
    runs: ClassVar[dict[str, str]] = {"the operator": "", "its activation": "activation"}

    def __init__(self, op: QOp, path: str, keep_signed: bool = False) -> None:
        super().__init__(path, op.held)
        self.op = op.op
        self.activation = op.activation
        self.input = acts_site(op.input_quantizer, f"{path}.input", keep_signed)
        self.output = acts_site(op.acts_quantizer, f"{path}.output", keep_signed)
        self.activation = _left_of(self.activation, self.output)

    def forward(self, *args: Any, fused: bool = True, **kwargs: Any) -> Tensor:
        run = active_run()
        if run is not None and run.checking:
            run.site = self.path
        if args:
            args = (self.input(args[0]), *args[1:])
        y = self.compute(*args, **kwargs)
        return self.output(y if self.activation is None else self.activation(y))

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the operator itself."""
        y = _global_average(self.op, args, kwargs) if as_nodes() else None
        return self.op(*args, **kwargs) if y is None else y


class DeployAttention(DeployOp):
    """Computes what a QAttention computes in QUANT_EVAL: its products on codes, the softmax between them in float32."""

    def __init__(self, op: QAttention, path: str, keep_signed: bool = False) -> None:
        super().__init__(op, path, keep_signed)
        self.probabilities = acts_site(op.probabilities_quantizer, f"{path}.probabilities", keep_signed)

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, probabilities=self.probabilities, **kwargs)


def _global_average(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Run a global average as the ONNX operator with an integer kernel; None for any other operator."""
    x = args[0] if args else None
    operator = operator_of_module(op) if isinstance(op, nn.Module) else OPERATORS.of(op)
    if not isinstance(x, Tensor) or x.ndim < 3 or operator is None:
        return None
    size, keep = None, True
    if operator.name == "adaptive_avg_pool":
        size = op.output_size if isinstance(op, nn.Module) else (*args[1:], *kwargs.values())[0]
    elif operator.name == "mean":
        dims, keep = (*args[1:], kwargs.get("dim"))[0], bool((*args[2:], kwargs.get("keepdim", False))[0])
        spatial = list(range(2, x.ndim))
        size = 1 if isinstance(dims, list | tuple) and sorted(d % x.ndim for d in dims) == spatial else None
    if size is None or any(s != 1 for s in (size if isinstance(size, list | tuple) else (size,))):
        return None
    pooled = node("GlobalAveragePool", (x,), x.dtype, (*x.shape[:2], *[1] * (x.ndim - 2)))
    return pooled if keep else pooled.flatten(1)


@torch.no_grad()
def deploy_form(model: nn.Module, keep_signed: bool = False) -> nn.Module:
    """Make a float32 CPU copy of the model in eval mode that computes QUANT_EVAL from stored 8-bit codes.

    The state of the QModules does not matter; a site without a quantizer stays float. Batch norms are folded where the
    codes can represent it exactly, and stay behind the layer elsewhere. Codes of activations count from 0 on, which is
    faster on x86, and so do codes of weights that could saturate there; `keep_signed` keeps the codes of the quantizer.
    Weights may have any scheme with codes; activations need a uniform one. Raises ExportError for a model without
    QModules, and, when the form runs, for a site that is not calibrated, has no such codes, needs more than 8 bits or
    is not float32. Sites that do not run raise nothing: `fix_bias_scales` leaves them out.
    """
    if not any(isinstance(module, QModule) for module in model.modules()):
        raise ExportError(
            f"{type(model).__name__} has no QModule, so nothing in it is quantized. Wrap its layers in QWrapper and "
            "its operators in QOp, or use torch.onnx.export for a float model"
        )
    try:
        own = copy.deepcopy(model)
    except RuntimeError as error:
        raise ExportError(
            f"the model cannot be copied: {str(error).splitlines()[0]} If a hook computes a weight, make it a plain "
            "weight with remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
        ) from error
    form = _converted(own.cpu().eval(), "", {}, keep_signed)
    reseal(form)
    return form


@torch.no_grad()
def fix_bias_scales(form: nn.Module, example_inputs: Any, tables: bool = True) -> IntegerRun:
    """Run the form on integers once, to put biases onto the grid of their sums and to check accumulators.

    `tables` as in `IntegerRun`. Returns the record of the run; sites that did not run are left out of the form. Raises
    ExportError for an accumulator beyond 32 bits, and for a site that runs without codes.
    """
    run = IntegerRun("exact", checking=True, tables=tables)
    with running(form, "example_inputs", example_inputs):
        example_inputs = tree_map_only(Tensor, lambda x: x.detach().cpu(), example_inputs)
    if any(not x.numel() for x in tree_leaves(example_inputs) if isinstance(x, Tensor)):
        raise ExportError("the example inputs are empty; give at least one row")
    with integer_run(run):
        try:
            run.not_run = leave_out(form, lambda: call_with(form, example_inputs))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, ExportError):
                raise
            raise ExportError(f"the model fails on the example inputs: {error}") from error
    reseal(form)
    for module in form.modules():
        if isinstance(module, DeployLayer):
            module.fix_bias_scales()
    return run


def _converted(module: nn.Module, path: str, done: dict[nn.Module, nn.Module], keep_signed: bool) -> nn.Module:
    """Replace every QModule below `module`, children first; a module that is used twice stays one."""
    if module not in done:
        held = module.held if isinstance(module, QModule) else None  # has the same children, and is kept
        for owner in (module, held) if held is not None else (module,):
            for name, child in owner._modules.items():
                if child is not None:
                    below = f"{path}.{name}" if path else name
                    owner._modules[name] = _converted(child, below, done, keep_signed)
        done[module] = _replacement(module, path or type(module).__name__, keep_signed)
    return done[module]


def _replacement(module: nn.Module, path: str, keep_signed: bool) -> nn.Module:
    if isinstance(module, FusedPart):
        return PassedOn(path, module.part)  # the DeployLayer runs it
    if stock_type(module) in RECURRENT and not has_hooks(module):
        return DeployWeights(QWeights(module, {}), path)  # torch.export would fix the number of its steps
    if not isinstance(module, QModule):
        return module
    kind: Any = form_of(module)
    if kind is None:
        raise ExportError(
            f"{path}: {type(module).__name__} is neither a QWrapper nor a QOp nor a QWeights; only these can be "
            "exported. Build the module from these"
        )
    refuse_hooks(path, {said: getattr(module, name) if name else module for said, name in kind.runs.items()})
    try:
        made: nn.Module = kind(module, path, keep_signed)
    except ExportError as error:  # matters where the module runs
        return LeftOut(path, module.held, error)
    return made


RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
FORMS: dict[type[QModule], type[StandIn]] = {
    QWrapper: DeployLayer,
    QAttention: DeployAttention,
    QOp: DeployOp,
    QWeights: DeployWeights,
}


def form_of(module: nn.Module) -> type[StandIn] | None:
    """Return the class that replaces a QModule in a lowered model; None for a kind without one."""
    return next((form for wrapped, form in FORMS.items() if isinstance(module, wrapped)), None)


def _left_of(activation: nn.Module | None, output: nn.Module) -> nn.Module | None:
    """Return the activation, or None if it is a clamp and the output codes could take over its bounds."""
    clamp = activation_clamp(activation)
    if clamp is None or not isinstance(output, QuantizeDequantize) or not output.clamp_codes(clamp):
        return activation
    return None
