"""Export a quantized model to a file that a runtime executes. Needs the extra `deploy`."""

from torchquant.deploy.certificate.checking import certify as certify
from torchquant.deploy.certificate.parity import FirstDifference as FirstDifference
from torchquant.deploy.certificate.parity import SiteParity as SiteParity
from torchquant.deploy.certificate.record import Certificate as Certificate
from torchquant.deploy.certificate.record import Comparison as Comparison
from torchquant.deploy.certificate.record import OutputRow as OutputRow
from torchquant.deploy.executorch import export_executorch as export_executorch
from torchquant.deploy.executorch import run_executorch as run_executorch
from torchquant.deploy.integer.model import IntegerModel as IntegerModel
from torchquant.deploy.integer.model import to_integer as to_integer
from torchquant.deploy.integer.simulation import runtime_exact as runtime_exact
from torchquant.deploy.lowering.lowered import FloatOperator as FloatOperator
from torchquant.deploy.lowering.lowered import Lowered as Lowered
from torchquant.deploy.lowering.lowered import lower as lower
from torchquant.deploy.onnx.export import export_onnx as export_onnx
from torchquant.deploy.onnx.qonnx import export_qonnx as export_qonnx
from torchquant.deploy.onnx.run import run_onnx as run_onnx
from torchquant.deploy.packed.file import load_packed as load_packed
from torchquant.deploy.packed.file import save_packed as save_packed
from torchquant.deploy.packed.size import FileSize as FileSize
from torchquant.deploy.packed.size import FileSizes as FileSizes
from torchquant.deploy.packed.size import file_sizes as file_sizes
from torchquant.deploy.weight_files.compressed_tensors import export_compressed_tensors as export_compressed_tensors
from torchquant.deploy.weight_files.gguf import export_gguf as export_gguf

__all__ = [
    "Certificate",
    "Comparison",
    "FileSize",
    "FileSizes",
    "FirstDifference",
    "FloatOperator",
    "IntegerModel",
    "Lowered",
    "OutputRow",
    "SiteParity",
    "certify",
    "export_compressed_tensors",
    "export_executorch",
    "export_gguf",
    "export_onnx",
    "export_qonnx",
    "file_sizes",
    "load_packed",
    "lower",
    "run_executorch",
    "run_onnx",
    "runtime_exact",
    "save_packed",
    "to_integer",
]
