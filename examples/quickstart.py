"""From a float network to an int8 file: `python examples/quickstart.py`; needs torchquant[demo]."""

import tempfile
from pathlib import Path

import torch

import torchquant as tq
from torchquant.deploy import export_onnx, run_onnx
from torchquant.runs.demo import QuantSmallResNet, SmallResNet, load_digits
from torchquant.runs.loop import accuracy, predict, train

torch.manual_seed(0)
data = load_digits(test_copies=2)
x, labels = data.test_images, data.test_labels

# 1. A float network. Yours comes trained.
network = SmallResNet()
train(network, data, epochs=8, learning_rate=8e-3, seed=0)
floating = accuracy(predict(network, x), labels)


# 2. The same network with a quantizer at every site: a factory is called with each layer.
def quantized(n_bits: int) -> QuantSmallResNet:
    return QuantSmallResNet(
        network,
        weight_quantizer=lambda module: tq.AffineQuantizer(n_bits, tq.BatchMinMax(axis=0), symmetric="narrow"),
        acts_quantizer=lambda module: tq.AffineQuantizer(n_bits, tq.ExpAvgMinMax()),
    )


# 3. Post-training quantization: show it some data, then switch the quantizers on.
model = quantized(n_bits=8)
with tq.qmodule_state(model, tq.QModuleState.CALIBRATION), torch.no_grad():
    model.eval()(data.train_epoch(torch.Generator().manual_seed(0))[0][:512])
tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
simulated = predict(model, x)
print(tq.state_report(model))

# 4. Quantization-aware training, for few bits.
qat_model = quantized(n_bits=4)
tq.set_qmodule_state(qat_model, tq.QModuleState.QUANT_AWARE_TRAIN)
train(qat_model, data, epochs=3, learning_rate=2e-3, seed=0)
tq.observe_weights(qat_model)  # the ranges follow the last optimizer step
tq.set_qmodule_state(qat_model, tq.QModuleState.QUANT_EVAL)
qat = accuracy(predict(qat_model, x), labels)

# 5. Export, and see that the file computes the same thing.
with tempfile.TemporaryDirectory() as folder:
    exported = run_onnx(export_onnx(model, Path(folder) / "w8a8.onnx", x[:2]), x)
same = float((exported.argmax(1) == simulated.argmax(1)).double().mean())
w8a8, onnx = accuracy(simulated, labels), accuracy(exported, labels)
print(
    f"\nfloat {floating:.2%}, W8A8 {w8a8:.2%}, W8A8 in ONNX Runtime {onnx:.2%} (same class: {same:.2%}), W4A4 {qat:.2%}"
)
assert floating > 0.8
assert min(w8a8, onnx) > floating - 0.02
assert qat > floating - 0.1
assert same > 0.98
