"""The parity certificate: whether an exported file computes what the model was evaluated with."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchquant._arguments import checked
from torchquant._files import write_whole
from torchquant.deploy.certificate import Certificate, Comparison, FinalOutputs
from torchquant.deploy.integer import IntegerModel, to_integer
from torchquant.deploy.onnx_graph import code_name
from torchquant.deploy.onnx_run import CodeReader, feeds_of, open_session
from torchquant.deploy.parity import Follower, SiteParity, simulated_codes
from torchquant.errors import ConfigError, ExportError, require
from torchquant.qmodule import QModuleState
from torchquant.utils import qmodule_state

TIE_BOUND = 2.0**-10
"""Steps from a tie within which float32 sums may round to the other side (docs/deploy.md)."""

WAYS = {"integer": "ORT, integer kernels", "none": "ORT, node by node"}
SIMULATION = "simulation"
Batch = tuple[tuple[Tensor, ...], Tensor | None]


@checked
@torch.no_grad()
def certify(
    model: nn.Module,
    path: str | os.PathLike[str],
    data: Any,
    bound: int = 0,
    tie_bound: float = TIE_BOUND,
    ways: str | Sequence[str] = ("integer", "none"),
    stamp: bool = False,
) -> Certificate:
    """Run the simulation, the integer reference and ONNX Runtime on the same batches and compare every code.

    model: the calibrated model that `path` was exported from by `export_onnx`. data: a tensor, a tuple of tensors for
    a model with several inputs, a list of such batches, or of (inputs, labels); a DataLoader. Labels give accuracies.

    Where ONNX Runtime computes a site by an integer kernel at most `bound` codes may differ from the reference; where
    it rounds a float32 result (its graph run node by node; operators without integer kernel), codes may differ by one
    step, and only within `tie_bound` steps of a tie; where it looks results up in a table (softmax, sigmoid), by one
    step. Real outputs behind the last codes may differ by 1e-4 of their largest. Each site is compared given the same
    inputs: the reference goes on with the runtime's codes. The simulation runs on its own, so that its differences add
    up; they are reported, not bounded. OpenVINO's outputs are compared where it is installed.

    `ways`: which graphs of ONNX Runtime, of "integer" and "none". `stamp` writes the certificate's hash into the
    file's metadata. The certificate says whether it `passed`; nothing is raised for one that did not. Raises
    ConfigError for data of another form, ExportError for a file that was not exported from this model.

    >>> import tempfile
    >>> from torchquant import QModuleState, qmodule_state, quantize
    >>> from torchquant.deploy import export_onnx
    >>> x = torch.randn(8, 4)
    >>> model = quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "int8-ort", x)
    >>> with qmodule_state(model, QModuleState.CALIBRATION):
    ...     _ = model(x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     certify(model, export_onnx(model, f"{folder}/model.onnx", x), x).passed
    True
    """
    ways = (ways,) if isinstance(ways, str) else tuple(ways)
    unknown = [way for way in ways if way not in WAYS]
    if bound < 0 or tie_bound < 0.0:
        raise ConfigError(f"bounds must be at least 0, got bound={bound} and tie_bound={tie_bound}")
    if unknown or not ways:
        raise ConfigError(f"ways must be of {', '.join(WAYS)}, got {', '.join(map(str, ways)) or 'none'}")
    batches = _batches(data)
    first_inputs, _ = batches[0]
    keep_signed = metadata_of(path).get("torchquant_keep_signed") == "1"
    integer = to_integer(model, first_inputs, "ort", keep_signed, as_exported=True)
    readers = {way: CodeReader(path, way) for way in ways}
    followers = {way: Follower(readers[way].makers, bound, tie_bound) for way in ways}
    simulation: dict[str, SiteParity] = {}
    finals = FinalOutputs()
    session = open_session(path, "all")
    openvino = _openvino(path)
    firsts: dict[str, Any] = {}
    apart = dict.fromkeys(ways, 0.0)
    _check_batches(session, batches)
    for inputs, labels in batches:
        reference = _reference(model, integer, inputs, simulation)
        found = dict(reference)
        for way, reader in readers.items():
            outputs, codes = reader.run(inputs)
            follower = followers[way]
            follower.start(codes)
            followed = integer.run(inputs, {}, follow=follower)
            apart[way] = max(apart[way], _apart(followed, outputs))
            if follower.first is not None and way not in firsts:
                difference, name = follower.first
                difference.inputs = reader.inputs_of(name, inputs)
                firsts[way] = difference
            found[WAYS[way]] = outputs[0]
        found["ORT, as deployed"] = torch.from_numpy(session.run(None, feeds_of(session, inputs))[0])
        if openvino is not None:
            found["OpenVINO"] = openvino(inputs)
        finals.add(found, labels)
    comparisons = [
        Comparison(WAYS[way], tuple(f.parity.values()), dict(readers[way].kernels), firsts.get(way), apart[way])
        for way, f in followers.items()
    ]
    _check_sites(path, comparisons)
    certificate = Certificate(
        comparisons=tuple(comparisons),
        simulation=Comparison(SIMULATION, tuple(simulation.values()), {}, None),
        outputs=finals.rows(),
        float_operators=tuple(f"{op.name} (after {op.after})" for op in integer.float_operators),
        bound=bound,
        tie_bound=tie_bound,
        batches=len(batches),
        samples=sum(len(inputs[0]) for inputs, _ in batches),
        file_sha256=graph_hash(path),
        versions=_versions(),
    )
    if stamp:
        stamp_file(path, certificate)
    return certificate


def _reference(
    model: nn.Module, integer: IntegerModel, inputs: tuple[Tensor, ...], simulation: dict[str, SiteParity]
) -> dict[str, Tensor]:
    """Outputs of the simulation and the reference, each on its own; their codes compared."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with qmodule_state(model, QModuleState.QUANT_EVAL), simulated_codes(model, integer.form) as codes:
            simulated = model(*(x.to(device) for x in inputs))
    finally:
        for module, mode in training.items():
            module.training = mode
    recorded: dict[str, list[Tensor]] = {}
    outputs = integer.run(inputs, {}, recorded)
    for site, calls in recorded.items():
        entry = simulation.setdefault(site, SiteParity(site, "simulation"))
        for expected, other in zip(calls, codes.get(site, []), strict=False):
            apart = (expected - other).abs()
            entry.elements += apart.numel()
            entry.differ += int((apart > 0).sum())
            entry.largest = max(entry.largest, int(apart.max()) if apart.numel() else 0)
    return {"simulation": _first(simulated).cpu(), "integer reference": _first(outputs)}


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _first(outputs: Any) -> Tensor:
    return _tensors(outputs)[0]


def _apart(expected: Any, found: Sequence[Tensor]) -> float:
    """The largest difference of the real outputs, over the largest magnitude of each."""
    apart = 0.0
    for reference, other in zip(_tensors(expected), found, strict=False):
        if reference.is_floating_point() and reference.numel():
            if reference.shape != other.shape:
                raise ExportError(
                    f"the file gives outputs of shape {list(other.shape)}, the model {list(reference.shape)}. "
                    "Certify a file that export_onnx wrote from this model"
                )
            a, b = reference.to(torch.float64), other.to(torch.float64)
            apart = max(apart, float(((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).nan_to_num(0.0)))
    return apart


def _check_batches(session: Any, batches: Sequence[Batch]) -> None:
    """Raise ConfigError for a batch that the file does not take."""
    wanted = session.get_inputs()
    for inputs, _ in batches:
        if len(inputs) != len(wanted):
            raise ConfigError(
                f"the file takes {len(wanted)} inputs, a batch has {len(inputs)}. Labels come in a list of (inputs, "
                "labels)"
            )
        for entry, x in zip(wanted, inputs, strict=True):
            fixed = entry.shape[0] if entry.shape else None
            if not x.numel() or (isinstance(fixed, int) and len(x) != fixed):
                raise ConfigError(f"input {entry.name} takes {entry.shape}, a batch has {list(x.shape)}")


def _check_sites(path: Any, comparisons: Sequence[Comparison]) -> None:
    """Raise ExportError for a file in which no site of the model is to be found."""
    for comparison in comparisons:
        if comparison.sites and not comparison.compared:
            absent = ", ".join(code_name(site.site, 0) for site in comparison.sites[:3])
            raise ExportError(
                f"{path} has none of the tensors of codes {absent}, ... of this model. Certify a file that export_onnx "
                "wrote from it"
            )


def _batches(data: Any) -> list[Batch]:
    """(inputs, labels or None) of each batch."""
    if isinstance(data, Tensor) or (isinstance(data, tuple) and all(isinstance(x, Tensor) for x in data)):
        return [_batch(data, labelled=False)]
    if not isinstance(data, Iterable):
        raise ConfigError(f"data must be tensors or batches of them, got {type(data).__name__}")
    found = [_batch(batch, labelled=True) for batch in data]
    if not found:
        raise ConfigError("data holds no batch")
    return found


def _batch(batch: Any, labelled: bool) -> Batch:
    if isinstance(batch, Tensor):
        return (batch.cpu(),), None
    if isinstance(batch, Sequence) and batch and labelled and len(batch) == 2:
        inputs, labels = batch
        if isinstance(inputs, Tensor) and isinstance(labels, Tensor) and not labels.is_floating_point():
            return (inputs.cpu(),), labels
        if isinstance(inputs, tuple | list) and isinstance(labels, Tensor):
            return tuple(x.cpu() for x in inputs), labels
    if isinstance(batch, Sequence) and batch and all(isinstance(x, Tensor) for x in batch):
        return tuple(x.cpu() for x in batch), None
    raise ConfigError(
        "a batch must be a tensor, a tuple of tensors, or (inputs, labels) with whole numbers as labels; got "
        f"{type(batch).__name__}"
    )


def graph_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of what an ONNX file computes: its graph and operator sets, without metadata."""
    proto = require("onnx", "deploy").load(os.fspath(path))
    digest = hashlib.sha256(proto.graph.SerializeToString(deterministic=True))
    digest.update(repr([(entry.domain, entry.version) for entry in proto.opset_import]).encode())
    return digest.hexdigest()


def metadata_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of an ONNX file. Raises ConfigError for a file that is none."""
    onnx = require("onnx", "deploy")
    try:
        proto = onnx.load(os.fspath(path))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except Exception as error:
        raise ConfigError(f"{path} is not an ONNX file: {error}") from error
    return {entry.key: entry.value for entry in proto.metadata_props}


def stamp_file(path: str | os.PathLike[str], certificate: Certificate) -> None:
    """Write the certificate's hash into the file's metadata. Raises ConfigError if the file is another one."""
    if graph_hash(path) != certificate.file_sha256:
        raise ConfigError(f"{path} is not the file that the certificate is about")
    proto = require("onnx", "deploy").load(os.fspath(path))
    kept = [entry for entry in proto.metadata_props if entry.key != "torchquant_certificate"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    proto.metadata_props.add(key="torchquant_certificate", value=certificate.sha256)
    write_whole(Path(path), lambda temporary: temporary.write_bytes(proto.SerializeToString()))


def _openvino(path: str | os.PathLike[str]) -> Any:
    """Inputs -> the first output in OpenVINO; None where it is not installed or does not take the file."""
    try:
        openvino = require("openvino", "openvino")
    except ImportError:
        return None
    try:
        compiled = openvino.Core().compile_model(os.fspath(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError:
        return None
    return lambda inputs: torch.from_numpy(compiled([x.cpu().numpy() for x in inputs])[0].copy())


def _versions() -> dict[str, str]:
    from torchquant import __version__

    return {
        "torchquant": __version__,
        "torch": torch.__version__,
        "onnxruntime": require("onnxruntime", "deploy").__version__,
        "machine": platform.machine(),
    }
