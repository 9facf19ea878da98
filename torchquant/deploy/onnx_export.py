"""Writing the deploy form of a model as a QDQ ONNX file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._files import write_whole
from torchquant._shown import shown
from torchquant.deploy.certify import certify
from torchquant.deploy.form import deploy_form, settle
from torchquant.deploy.onnx_graph import PACKED_OPSET, finish_graph
from torchquant.deploy.qdq import onnx_nodes
from torchquant.errors import ConfigError, ExportError, require
from torchquant.plan import QuantPlan

MAX_BYTES = 2**31 - 1
"""What a single ONNX file can hold."""


@checked
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor],
    dynamic_batch: bool = True,
    verify: bool = True,
    keep_signed: bool = False,
) -> Path:
    """Write a calibrated model as one ONNX file that computes what QUANT_EVAL computes. Returns its path.

    Weights are stored as codes of 8, 4 or 2 bits, per channel where the quantizer is, batch norms folded; those of
    schemes that are not uniform as codes and the levels behind them, bit for bit. Activations pass
    QuantizeLinear/DequantizeLinear pairs; biases are 32-bit steps of input scale times weight scale; sites without
    quantizer are float32. The tensor of codes of a site is called "SITE.codes". Operator set 20, with weights of 4 bits
    21, of 2 bits 25. docs/deploy.md tells what runtimes make of it.

    `example_inputs`: what `model(*example_inputs)` takes, tensors on any device. `dynamic_batch`
    leaves the size of axis 0 of every input open. `verify` runs the file on the example and compares all codes (see
    `certify`). `keep_signed`: codes of signed activations stay signed, as TensorRT and ARM want them; otherwise they
    count from 0 on, which x86 processors multiply faster. The model itself is not changed; a file that cannot
    be finished is not begun. Needs the extra `deploy`.

    Raises ExportError for what the file cannot hold, or where ONNX Runtime computes something else; ConfigError,
    MissingDependencyError.

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
    inputs = checked_inputs(example_inputs)
    form = deploy_form(model, keep_signed)
    settle(form, inputs, tables=False)
    n_bytes = sum(t.nbytes for t in form.state_dict().values() if isinstance(t, Tensor))
    if n_bytes > MAX_BYTES:
        raise ExportError(f"the model needs {n_bytes / 2**30:.2f} GiB, one ONNX file holds 2 GiB. Quantize more of it")
    proto = exported(form, inputs, dynamic_batch)
    finish_graph(proto, form)
    describe(proto, model, {"torchquant_keep_signed": "1"} if keep_signed else {})
    require("onnx", "deploy").checker.check_model(proto, full_check=True)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        temporary.write_bytes(proto.SerializeToString())
        if verify:
            _verify(model, temporary, inputs)

    return write_whole(target, write)


def describe(proto: Any, model: nn.Module, notes: dict[str, str]) -> None:
    """Metadata: who wrote the file and by which plan, and `notes`."""
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


def _verify(model: nn.Module, path: Path, inputs: tuple[Tensor, ...]) -> None:
    certificate = certify(model, path, inputs, ways=("none",))
    if not certificate.passed:
        raise ExportError(
            f"ONNX Runtime does not compute what the model does: {certificate.failures[0]}. Pass verify=False to get "
            "the file all the same, and certify() for the whole comparison"
        )


def checked_inputs(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The example as CPU tensors. Raises ConfigError."""
    given: tuple[Any, ...] = (example_inputs,)
    if isinstance(example_inputs, Sequence):
        given = tuple(example_inputs)
    if not given or not all(isinstance(x, Tensor) for x in given):
        kinds = ", ".join(type(x).__name__ for x in given) or "nothing"
        raise ConfigError(f"example_inputs must be a tensor or a sequence of tensors, got {kinds}")
    if any(x.is_complex() for x in given):
        raise ConfigError(f"ONNX files here take real and whole numbers, got {', '.join(map(shown, given))}")
    return tuple(x.detach().cpu() for x in given)


def exported(form: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool) -> Any:
    """The ModelProto of torch's exporter. A batch of 1 is doubled: torch.export takes sizes 0 and 1 for constants."""
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        inputs = tuple(torch.cat([x, x]) if x.ndim and len(x) == 1 else x for x in inputs)
        shapes = tuple({0: batch} if x.ndim else {} for x in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with onnx_nodes(), torch.no_grad():
                program = torch.export.export(form, inputs, dynamic_shapes=shapes, strict=False)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n\n")[0]
            hint = "\nIf the model fixes its batch size, pass dynamic_batch=False" if dynamic_batch else ""
            raise ExportError(f"torch.export cannot trace the model: {reason}{hint}") from error
        try:
            made = torch.onnx.export(
                program, dynamo=True, opset_version=PACKED_OPSET[8], dynamic_shapes=shapes, verbose=False
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"torch.onnx.export cannot translate the model: {_root_cause(error)}") from error
    assert made is not None
    return made.model_proto


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
