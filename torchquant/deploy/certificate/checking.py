"""Make the parity certificate: compare every code of an exported file with the integer reference."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchquant._arguments import checked
from torchquant._files import write_whole
from torchquant._modes import in_mode
from torchquant._shown import shown
from torchquant.deploy.certificate.parity import FirstDifference, Follower, Probe, SiteParity, simulated_codes
from torchquant.deploy.certificate.record import REFERENCE, Certificate, Comparison, FinalOutputs, largest_apart
from torchquant.deploy.integer.model import IntegerModel, to_integer
from torchquant.deploy.lowering.lowered import Lowered
from torchquant.deploy.onnx.graph import code_name
from torchquant.deploy.onnx.run import CodeReader, feeds_of, open_session
from torchquant.errors import ConfigError, ExportError, NonFiniteError, require
from torchquant.graph.recording import call_with
from torchquant.qmodule import QModuleState
from torchquant.utils import qmodule_state

TIE_BOUND = 2.0**-10
"""Steps from a tie within which float32 sums may round to the other side (docs/deploy.md)."""

WAYS = {"integer": "ORT, integer kernels", "none": "ORT, node by node"}
SIMULATION = "simulation"
OTHER_FILE = "Certify a file that export_onnx wrote from this model"
Batch = tuple[tuple[Tensor, ...], Tensor | None]


@checked
@torch.no_grad()
def certify(
    model: nn.Module | Lowered,
    path: str | os.PathLike[str],
    data: Any,
    bound: int = 0,
    tie_bound: float = TIE_BOUND,
    ways: str | Sequence[str] = ("integer", "none"),
    stamp: bool = False,
) -> Certificate:
    """Run the simulation, the integer reference and ONNX Runtime on the same batches and compare every code.

    model: the calibrated model from which `export_onnx` wrote `path`, or its `lower` result. data: a tensor, a tuple of
    tensors for a model with several inputs, a list of such batches or of (inputs, labels), or a DataLoader. Labels are
    class indices of the first output, one for each sample or position; with them accuracies are reported. One batch is
    in memory at a time. NaN in the inputs is refused; NaN in the outputs of any engine is a failure.

    Where ONNX Runtime computes a site with an integer kernel, at most `bound` codes may differ from the reference.
    Where it rounds a float32 result (its graph run node by node; operators without integer kernel), codes may differ by
    one step (LSB), and only within `tie_bound` steps of a tie; where it looks results up in a table (softmax, sigmoid),
    by one step. Real outputs behind the last codes may differ by 1e-4 of their largest value. Each site is compared for
    the same inputs: the reference continues with the runtime's codes. The simulation runs on its own, so that its
    differences accumulate; they are reported, not bounded. OpenVINO's outputs are compared where it is installed.

    `ways`: which graphs of ONNX Runtime, of "integer" and "none". `stamp` writes the certificate's hash into the file's
    metadata. The certificate has not `passed` where a code differs more than is allowed, or where codes of a site could
    not be compared (`incomplete`); this raises nothing. Raises ConfigError for data of another form, NonFiniteError for
    NaN, ExportError for a file that was not exported from this model.

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
        raise ConfigError(f"ways must be of {', '.join(WAYS)}, got {', '.join(ways) or 'none'}")
    keep_signed = metadata_of(path).get("torchquant_keep_signed") == "1"
    engines = _Engines(model, keep_signed, path, ways, bound, tie_bound)
    batches = samples = 0
    for inputs, labels in _batches(data, engines.session):
        engines.run(inputs, labels)
        batches, samples = batches + 1, samples + len(inputs[0])
    if engines.integer is None:
        raise ConfigError("data must hold at least one batch, got none")
    comparisons = engines.comparisons()
    _check_sites(path, comparisons)
    certificate = Certificate(
        comparisons=tuple(comparisons),
        simulation=Comparison(SIMULATION, tuple(engines.simulation.values()), {}, None),
        outputs=engines.finals.rows(),
        float_operators=tuple(f"{op.name} (after {op.after})" for op in engines.integer.float_operators),
        bound=bound,
        tie_bound=tie_bound,
        batches=batches,
        samples=samples,
        file_sha256=graph_hash(path),
        versions=_versions(),
        not_run=engines.integer.not_run,
    )
    if stamp:
        stamp_file(path, certificate)
    return certificate


class _Engines:
    """All engines that compute the same outputs, and their comparison so far. Holds one batch at a time."""

    def __init__(
        self,
        model: nn.Module | Lowered,
        keep_signed: bool,
        path: str | os.PathLike[str],
        ways: Sequence[str],
        bound: int,
        tie_bound: float,
    ) -> None:
        if isinstance(model, Lowered) and model.keep_signed != keep_signed:
            raise ExportError(f"{path} was written with keep_signed={keep_signed}, but the model was lowered otherwise")
        self.given, self.keep_signed = model, keep_signed
        self.model = model.model if isinstance(model, Lowered) else model
        self.integer: IntegerModel | None = None
        self.readers = {way: CodeReader(path, way) for way in ways}
        self.followers = {way: Follower(self.readers[way].makers, bound, tie_bound) for way in ways}
        self.session = open_session(path, "all")
        self.openvino = _openvino(path)
        self.simulation: dict[str, SiteParity] = {}
        self.finals = FinalOutputs()
        self.firsts: dict[str, FirstDifference] = {}
        self.apart = dict.fromkeys(ways, 0.0)

    def run(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> None:
        """Compare all engines on one batch."""
        if self.integer is None:
            example = None if isinstance(self.given, Lowered) else inputs
            self.integer = to_integer(self.given, example, "ort", self.keep_signed, as_exported=True)
        found = _reference(self.model, self.integer, inputs, self.simulation)
        for way, reader in self.readers.items():
            outputs, codes = reader.run(inputs)
            follower = self.followers[way]
            follower.start(codes)
            followed = self.integer.run(inputs, {}, follow=follower)
            follower.finish(_needed(self.integer, inputs, codes, follower.lost))
            self.apart[way] = max(self.apart[way], _apart(followed, outputs))
            if follower.first is not None and way not in self.firsts:
                difference, name = follower.first
                difference.inputs = reader.inputs_of(name, inputs)
                self.firsts[way] = difference
            found[WAYS[way]] = outputs
        deployed = self.session.run(None, feeds_of(self.session, inputs))
        found["ORT, as deployed"] = [torch.from_numpy(output) for output in deployed]
        if self.openvino is not None:
            found["OpenVINO"] = [self.openvino(inputs)]
        self.finals.add(found, labels)

    def comparisons(self) -> list[Comparison]:
        """Return one comparison for each way to run ONNX Runtime."""
        return [
            Comparison(
                WAYS[way],
                tuple(follower.parity.values()),
                dict(self.readers[way].kernels),
                self.firsts.get(way),
                self.apart[way],
            )
            for way, follower in self.followers.items()
        ]


def _reference(
    model: nn.Module, integer: IntegerModel, inputs: tuple[Tensor, ...], simulation: dict[str, SiteParity]
) -> dict[str, list[Tensor]]:
    """Run the simulation and the reference, each on its own; return their outputs and compare their codes."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with (
        in_mode(False, model),
        qmodule_state(model, QModuleState.QUANT_EVAL),
        simulated_codes(model, integer.form) as codes,
    ):
        simulated = call_with(model, tuple(x.to(device) for x in inputs), "a batch")
    recorded: dict[str, list[Tensor]] = {}
    outputs = integer.run(inputs, {}, recorded)
    for site, calls in recorded.items():
        entry = simulation.setdefault(site, SiteParity(site, "simulation"))
        for expected, other in zip(calls, codes.get(site, []), strict=False):
            apart = (expected - other).abs()
            entry.elements += apart.numel()
            entry.differ += int((apart > 0).sum())
            entry.largest = max(entry.largest, int(apart.max()) if apart.numel() else 0)
    return {SIMULATION: [x.cpu() for x in _tensors(simulated)], REFERENCE: _tensors(outputs)}


def _needed(
    integer: IntegerModel, inputs: tuple[Tensor, ...], found: Mapping[str, Tensor], lost: Iterable[str]
) -> list[str]:
    """Return those `lost` sites on which an output, or the codes of a found site, depend."""

    def computed(changed: str | None) -> list[Tensor]:
        probe = Probe(found, changed)
        return [*_tensors(integer.run(inputs, {}, follow=probe)), *probe.seen]

    plain = computed(None) if lost else []
    return [site for site in lost if not all(map(torch.equal, plain, computed(site)))]


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors in a model output. Raises ConfigError if there is none."""
    found = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not found:
        raise ConfigError(f"the output of the model must hold a tensor to compare, got {shown(outputs)}")
    return found


def _apart(expected: Any, found: Sequence[Tensor]) -> float:
    """Return the largest difference of the real outputs, relative to the largest magnitude of each."""
    apart = 0.0
    references = _tensors(expected)
    if len(references) != len(found):
        raise ExportError(f"the file has {len(found)} outputs, but the model has {len(references)}. {OTHER_FILE}")
    for reference, other in zip(references, found, strict=True):
        if reference.shape != other.shape:
            raise ExportError(
                f"the file gives outputs of shape {list(other.shape)}, the model {list(reference.shape)}. {OTHER_FILE}"
            )
        if reference.is_floating_point() and reference.numel():
            largest = reference.to(torch.float64).nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1e-30)
            apart = max(apart, min(largest_apart(reference, other) / float(largest), sys.float_info.max))
    return apart


def _check_sites(path: Any, comparisons: Sequence[Comparison]) -> None:
    """Raise ExportError for a file that contains no site of the model."""
    for comparison in comparisons:
        if comparison.sites and not comparison.compared:
            absent = ", ".join(code_name(site.site, 0) for site in comparison.sites[:3])
            raise ExportError(
                f"{path} has none of the tensors of codes {absent}, ... of this model. Certify a file that export_onnx "
                "wrote from it"
            )


def _batches(data: Any, session: Any) -> Iterator[Batch]:
    """Yield (inputs, labels or None) batch by batch, after checking that the file takes the inputs and none is NaN."""
    if isinstance(data, Tensor) or (isinstance(data, tuple) and data and all(isinstance(x, Tensor) for x in data)):
        data = [(data,) if isinstance(data, Tensor) else data]
        batches: Iterator[Batch] = ((tuple(batch), None) for batch in data)
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        n_inputs = len(session.get_inputs())
        batches = (_batch(batch, n_inputs) for batch in data)
    else:
        raise ConfigError(f"data must be tensors or batches of them, in a list or a DataLoader; got {shown(data)}")
    for i, (inputs, labels) in enumerate(batches):
        try:
            feeds_of(session, inputs)
        except ConfigError as error:
            raise ConfigError(f"batch {i}: {error}. To give labels, pass a list of (inputs, labels)") from error
        for entry, x in zip(session.get_inputs(), inputs, strict=True):
            if not x.ndim or not x.numel():
                raise ConfigError(f"batch {i}: input {entry.name} must have samples along axis 0, got {shown(x)}")
            if bool(x.isnan().any()):
                raise NonFiniteError(
                    f"batch {i}: {int(x.isnan().sum())} of {x.numel()} values of input {entry.name} are NaN. A "
                    "certificate compares numbers; remove the NaN from the data"
                )
        yield inputs, labels


def _batch(batch: Any, n_inputs: int) -> Batch:
    """Return one batch on the CPU as (inputs, labels or None). Raises ConfigError."""
    if isinstance(batch, Tensor):
        return (batch.cpu(),), None
    if isinstance(batch, tuple | list) and len(batch) == n_inputs and all(isinstance(x, Tensor) for x in batch):
        return tuple(x.cpu() for x in batch), None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = ((batch[0],) if isinstance(batch[0], Tensor) else batch[0]), batch[1]
        are_inputs = isinstance(inputs, tuple | list) and all(isinstance(x, Tensor) for x in inputs)
        is_whole = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
        if inputs and are_inputs and is_whole:
            return tuple(x.cpu() for x in inputs), labels
    parts = ", ".join(map(shown, batch)) if isinstance(batch, tuple | list) else shown(batch)
    raise ConfigError(
        f"a batch must be a tensor, a tuple of the {n_inputs} inputs of the file, or (inputs, labels) with whole "
        f"numbers as labels; got {parts or 'nothing'}"
    )


def graph_hash(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of an ONNX file's graph and operator sets, without metadata."""
    proto = require("onnx", "deploy").load(os.fspath(path))
    digest = hashlib.sha256(proto.graph.SerializeToString(deterministic=True))
    digest.update(repr([(entry.domain, entry.version) for entry in proto.opset_import]).encode())
    return digest.hexdigest()


def metadata_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of an ONNX file. Raises ConfigError for another kind of file."""
    onnx = require("onnx", "deploy")
    try:
        proto = onnx.load(os.fspath(path))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except Exception as error:
        raise ConfigError(f"{path} is not an ONNX file: {error}") from error
    return {entry.key: entry.value for entry in proto.metadata_props}


def stamp_file(path: str | os.PathLike[str], certificate: Certificate) -> None:
    """Write the certificate's hash into the file's metadata. Raises ConfigError for a file that it does not certify."""
    if graph_hash(path) != certificate.file_sha256:
        raise ConfigError(f"{path} is not the file that was certified; stamp that file, or certify this one")
    proto = require("onnx", "deploy").load(os.fspath(path))
    kept = [entry for entry in proto.metadata_props if entry.key != "torchquant_certificate"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    proto.metadata_props.add(key="torchquant_certificate", value=certificate.sha256)
    write_whole(Path(path), lambda temporary: temporary.write_bytes(proto.SerializeToString()))


def _openvino(path: str | os.PathLike[str]) -> Any:
    """Return a function inputs -> first output in OpenVINO; None where it is not installed or rejects the file."""
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
