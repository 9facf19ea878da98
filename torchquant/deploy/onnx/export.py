"""Write a lowered model as a QDQ ONNX file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._files import write_whole
from torchquant._shown import shown, some
from torchquant.deploy.certificate.checking import certify
from torchquant.deploy.lowering.lowered import Lowered, lowered_as
from torchquant.deploy.lowering.qdq import onnx_nodes
from torchquant.deploy.onnx.graph import PACKED_OPSET, finish_graph
from torchquant.errors import ConfigError, ExportError, require
from torchquant.plan import QuantPlan

OpenAxes = Sequence[Mapping[int, Any]]
"""A mapping for each input: axis -> the name of its size, or a torch.export.Dim."""
MAX_BYTES = 2**31 - 1
"""Largest size of a single ONNX file in bytes."""


@checked
def export_onnx(
    model: nn.Module | Lowered,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    dynamic_batch: bool = True,
    verify: bool = True,
    keep_signed: bool = False,
    dynamic_shapes: OpenAxes | None = None,
) -> Path:
    """Write a calibrated model as one ONNX file that computes what QUANT_EVAL computes. Returns its path.

    Weights are stored as codes of 8, 4 or 2 bits, per channel if the quantizer is, with batch norms folded; weights of
    non-uniform schemes are stored as codes and a table of their levels, bit for bit. Activations pass through
    QuantizeLinear/DequantizeLinear pairs; biases are 32-bit integers in steps of input scale times weight scale; sites
    without quantizer are float32. The tensor with the codes of a site is named "SITE.codes". The operator set is 20,
    with 4-bit weights 21, with 2-bit weights 25. docs/deploy.md says how runtimes execute the file.

    `model`: the model, with `example_inputs`, tensors on any device for `model(*example_inputs)`; or the result of
    `lower`, which `certify` and `to_integer` take too. `dynamic_batch` makes axis 0 of every input dynamic.
    `dynamic_shapes` makes other axes dynamic: for each input a mapping of axes to names, as
    `({2: "height", 3: "width"},)`, for any size from that of the example on; axes with the same name have the same
    size. A name may be a `torch.export.Dim`, such as `32 * Dim("rows", min=2)` where only multiples are valid. `verify`
    runs the file on the example, and on one twice as large along the axes of `dynamic_shapes`, and compares all codes
    (see `certify`).

    `keep_signed`: signed codes stay signed, as OpenVINO, TensorRT and ARM need them; otherwise codes of activations
    count from 0 on, which x86 processors multiply faster, and so do codes of 8-bit weights, whose sums would saturate
    in ONNX Runtime on processors without VNNI. The model is not changed; an export that fails leaves no file. Needs the
    extra `deploy`.

    The file holds only the parts that the model runs on the example, in evaluation. A site that does not run need not
    be calibrated; a warning names it.

    Raises ExportError for parts that the file cannot hold, for a site that runs and has seen no data, and if ONNX
    Runtime computes something else; ConfigError, MissingDependencyError.

    >>> import tempfile
    >>> from torchquant import AffineQuantizer, BatchMinMax, QModuleState, QWrapper, qmodule_state
    >>> weights = AffineQuantizer(8, BatchMinMax(axis=0), symmetric="narrow")
    >>> model = QWrapper(nn.Linear(4, 2), weights, acts_quantizer=AffineQuantizer(8, BatchMinMax()))
    >>> with qmodule_state(model, QModuleState.CALIBRATION):
    ...     _ = model(torch.randn(8, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(model, f"{folder}/model.onnx", torch.randn(1, 4)).name
    'model.onnx'
    """
    for package in ("onnx", "onnxscript", *(("onnxruntime",) if verify else ())):
        require(package, "deploy")
    if example_inputs is not None:
        example_inputs = checked_inputs(example_inputs)
    lowered = lowered_as(model, example_inputs, keep_signed, as_exported=True)
    form, inputs = lowered.form, checked_inputs(lowered.example_inputs)
    tell_of_left_out(lowered.not_run)
    n_bytes = sum(t.untyped_storage().nbytes() for t in form.state_dict().values() if isinstance(t, Tensor))
    if n_bytes > MAX_BYTES:
        raise ExportError(f"the model needs {n_bytes / 2**30:.2f} GiB, an ONNX file holds 2 GiB. Quantize more of it")
    proto = exported(form, inputs, dynamic_batch, dynamic_shapes)
    finish_graph(proto, form)
    describe(proto, lowered.model, {"torchquant_keep_signed": "1"} if lowered.keep_signed else {})
    require("onnx", "deploy").checker.check_model(proto, full_check=True)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        temporary.write_bytes(proto.SerializeToString())
        if verify:
            _verify(lowered, temporary, inputs, dynamic_shapes)

    return write_whole(target, write)


def tell_of_left_out(paths: Sequence[str]) -> None:
    """Warn about sites that are not in the file because the example did not run them."""
    if paths:
        warnings.warn(
            f"{len(paths)} sites did not run on the example inputs and are not in the file: {some(paths)}. This is "
            "right for parts that only training runs, such as auxiliary heads; to include them, give example inputs on "
            "which the model runs them",
            stacklevel=4,
        )


def describe(proto: Any, model: nn.Module, notes: dict[str, str]) -> None:
    """Write metadata: the version that wrote the file, the plan, and `notes`."""
    from torchquant import __version__

    notes = {"torchquant_version": __version__, **notes}
    plan = getattr(model, "plan", None)
    if isinstance(plan, QuantPlan):
        try:
            notes["torchquant_plan"] = json.dumps(plan.to_dict())
        except ConfigError:  # a quantizer made by a function has no text
            notes["torchquant_plan"] = plan.describe()
    for key, value in notes.items():
        proto.metadata_props.add(key=key, value=value)


def _verify(lowered: Lowered, path: Path, inputs: tuple[Tensor, ...], dynamic_shapes: OpenAxes | None) -> None:
    batches = [inputs]
    if dynamic_shapes is not None:
        batches.append(tuple(_twice(x, axes) for x, axes in zip(inputs, dynamic_shapes, strict=True)))
    try:
        certificate = certify(lowered, path, batches, ways=("none",))
    except (RuntimeError, ConfigError) as error:
        if dynamic_shapes is None:
            raise
        raise ExportError(
            f"the model fails at twice the size of the example along the axes of dynamic_shapes: {error}. Pass "
            "verify=False if you do not need such sizes"
        ) from error
    if not certificate.passed:
        raise ExportError(
            f"ONNX Runtime computes something else than the model: {certificate.failures[0]}. Pass verify=False to get "
            "the file anyway, and call certify() for the whole comparison"
            if certificate.failures
            else f"the file could not be checked: {certificate.incomplete[0]}. Pass verify=False to get it anyway"
        )


def _twice(x: Tensor, axes: Iterable[int]) -> Tensor:
    """Repeat x twice along each of the axes."""
    for axis in axes:
        x = torch.cat([x, x], axis)
    return x


def checked_inputs(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the example as CPU tensors. Raises ConfigError."""
    given: tuple[Any, ...] = (example_inputs,)
    if isinstance(example_inputs, Sequence):
        given = tuple(example_inputs)
    if not given or not all(isinstance(x, Tensor) for x in given):
        kinds = ", ".join(type(x).__name__ for x in given) or "nothing"
        raise ConfigError(f"example_inputs must be a tensor or a sequence of tensors, got {kinds}")
    if any(x.is_complex() for x in given):
        raise ConfigError(f"inputs of an ONNX file must be real or whole numbers, got {', '.join(map(shown, given))}")
    return tuple(x.detach().cpu() for x in given)


def _named_axes(inputs: tuple[Tensor, ...], dynamic_shapes: OpenAxes) -> list[dict[int, Any]]:
    """Return the dynamic axes of each input, counted from 0, with a `Dim` for each name. Raises ConfigError."""
    allowed = 'for each input a mapping of axes to names, such as ({2: "height", 3: "width"},)'
    if len(dynamic_shapes) != len(inputs):
        raise ConfigError(f"dynamic_shapes has {len(dynamic_shapes)} mappings for {len(inputs)} inputs; give {allowed}")
    dims: dict[str, Any] = {}
    found = []
    for x, axes in zip(inputs, dynamic_shapes, strict=True):
        for axis, name in axes.items():
            if not -x.ndim <= axis < x.ndim:
                raise ConfigError(f"dynamic_shapes: an input of {x.ndim} dimensions has no axis {axis!r}")
            if not hasattr(name, "__name__") and not (isinstance(name, str) and name.isidentifier()):
                raise ConfigError(
                    f"dynamic_shapes: axis {axis} must be a name or a torch.export.Dim, got {shown(name)}"
                )
            if isinstance(name, str) and name not in dims:
                least = {} if axis % x.ndim == 0 else {"min": max(x.shape[axis], 2)}  # a batch may have one sample
                dims[name] = torch.export.Dim(name, **least)
        found.append({axis % x.ndim: dims.get(name, name) for axis, name in axes.items()})
    return found


def exported(
    form: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool, dynamic_shapes: OpenAxes | None = None
) -> Any:
    """Run torch's exporter; return the ModelProto. Dynamic sizes of 1 are doubled: torch.export fixes them."""
    shapes = [{} for _ in inputs] if dynamic_shapes is None else _named_axes(inputs, dynamic_shapes)
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        shapes = [{0: batch, **axes} if x.ndim else axes for x, axes in zip(inputs, shapes, strict=True)]
    inputs = tuple(_twice(x, [a for a in axes if x.shape[a] == 1]) for x, axes in zip(inputs, shapes, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with onnx_nodes(), torch.no_grad():
                program = torch.export.export(form, inputs, dynamic_shapes=tuple(shapes), strict=False)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n\n")[0]
            hint = "\nIf the model fixes its batch size, pass dynamic_batch=False" if dynamic_batch else ""
            if dynamic_shapes is not None:
                hint += (
                    "\nAn axis that the model fixes must not be in dynamic_shapes; give an axis with only some valid "
                    "sizes as a torch.export.Dim, such as 2 * Dim('height', min=8)"
                )
            raise ExportError(f"torch.export cannot trace the model: {reason}{hint}") from error
        try:
            made = torch.onnx.export(
                program, dynamo=True, opset_version=PACKED_OPSET[8], dynamic_shapes=tuple(shapes), verbose=False
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"torch.onnx.export cannot translate the model: {_root_cause(error)}") from error
    assert made is not None
    return made.model_proto


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
