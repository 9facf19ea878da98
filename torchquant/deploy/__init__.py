"""From a quantized model to a file that a runtime executes. Needs the extra `deploy`."""

from torchquant.deploy.onnx_export import export_onnx as export_onnx
from torchquant.deploy.onnx_run import run_onnx as run_onnx

__all__ = ["export_onnx", "run_onnx"]
