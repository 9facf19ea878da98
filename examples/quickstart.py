"""From a float network to an int8 file: `python examples/quickstart.py`; needs torchquant[demo]."""

import tempfile
from pathlib import Path

import torch

import torchquant as tq
from torchquant.deploy import export_onnx, run_onnx
from torchquant.runs.data import TrainBatches, load_digits
from torchquant.runs.small_resnet import QuantSmallResNet, SmallResNet

torch.manual_seed(0)
data = load_digits(test_copies=2)
x, labels = data.test_images, data.test_labels
train, test = TrainBatches(data), [(x, labels)]  # any iterables of (inputs, targets): lists, DataLoaders

# 1. A float network. Yours comes trained.
network = SmallResNet()
tq.fit(network, train, epochs=8, learning_rate=8e-3)
floating = tq.evaluate(network, test)


# 2. The same network with a quantizer at every site: a factory is called with each layer.
def quantized(n_bits: int) -> QuantSmallResNet:
    return QuantSmallResNet(
        network,
        weight_quantizer=lambda module: tq.AffineQuantizer(n_bits, tq.BatchMinMax(axis=0), symmetric="narrow"),
        acts_quantizer=lambda module: tq.AffineQuantizer(n_bits, tq.ExpAvgMinMax()),
    )


# 3. Post-training quantization: calibrate on some data; then the quantizers are on.
model = quantized(n_bits=8)
tq.calibrate(model, train, max_batches=8)
w8a8 = tq.evaluate(model, test)
print(tq.state_report(model))

# 4. Quantization-aware training, for low bit widths.
qat_model = quantized(n_bits=4)
tq.fit(qat_model, train, epochs=3, learning_rate=2e-3, state=tq.QModuleState.QUANT_AWARE_TRAIN)
qat = tq.evaluate(qat_model, test)

# 5. Export, and check that the file computes the same.
with tempfile.TemporaryDirectory() as folder:
    exported = run_onnx(export_onnx(model, Path(folder) / "w8a8.onnx", x[:2]), x)
onnx = float((exported.argmax(1) == labels).double().mean())
same = tq.evaluate(model, [(x, exported.argmax(1))])
print(
    f"\nfloat {floating:.2%}, W8A8 {w8a8:.2%}, W8A8 in ONNX Runtime {onnx:.2%} (same class: {same:.2%}), W4A4 {qat:.2%}"
)
assert floating > 0.8
assert min(w8a8, onnx) > floating - 0.02
assert qat > floating - 0.1
assert same > 0.98
