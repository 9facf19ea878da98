"""Count the codes that differ between an exported file in ONNX Runtime and the integer reference, for whole networks.

    python -m benchmarks.parity resnet18 mobilenet_v2 --size 64
    python -m benchmarks.parity vit_b_16 --size 224 --out parity.json

Weights and images are random; batch norms have random statistics and factors, so that nothing cancels out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from torchquant import QModuleState, qmodule_state, quantize, set_qmodule_state
from torchquant._files import write_json
from torchquant._tables import text_table
from torchquant.deploy import Certificate, certify, export_onnx
from torchquant.errors import require

HEADER = ["network", "integer kernels: differ", "node by node: differ", "passed"]


def randomized(name: str) -> nn.Module:
    """Build a torchvision model with non-trivial batch norms."""
    net: nn.Module = require("torchvision.models", "all").get_model(name).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.normal_(1.0, 0.3)
    return net


def parity(name: str, rules: str, size: int, images: int, seed: int = 0) -> Certificate:
    """Quantize, calibrate, export, certify on other images."""
    torch.manual_seed(seed)
    net, x = randomized(name), torch.randn(images, 3, size, size)
    model = quantize(net, rules, x)
    with torch.no_grad(), qmodule_state(model, QModuleState.CALIBRATION):
        model(x)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "model.onnx", x[:2], verify=False)
        return certify(model, path, torch.randn_like(x))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", help="names of torchvision models")
    parser.add_argument("--rules", default="int8-ort", help="the name of a rule set")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON file for all certificates")
    options = parser.parse_args()
    certificates, rows = {}, []
    for name in options.networks:
        found = certificates[name] = parity(name, options.rules, options.size, options.images)
        rows.append(
            [name, *(f"{c.differ} of {c.elements}" for c in found.comparisons), "yes" if found.passed else "NO"]
        )
        print(text_table(HEADER, rows[-1:]))
    print()
    print(text_table(HEADER, rows))
    if options.out is not None:
        write_json(options.out, {name: found.to_dict() for name, found in certificates.items()})


if __name__ == "__main__":
    main()
