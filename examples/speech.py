"""Recognize words of three tones with a 4-bit LSTM: `python examples/speech.py`; needs torchquant[deploy].

A speaker says one of eight words in noise, each of three tones that are high or low, at a pitch and a speed of its own.
The network reads a spectrogram frame by frame. The matrices of the LSTM have 4-bit codes, what it reads and writes 8.
"""

import math

import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.deploy import certify, export_onnx, file_sizes, save_packed

RATE, SECONDS, N_WORDS = 4000, 0.5, 8
torch.manual_seed(0)


def speech(n: int) -> tuple[Tensor, Tensor]:
    """Make n recordings, (n, samples), and the words in them."""
    words = torch.randint(N_WORDS, (n,))
    time = torch.arange(int(RATE * SECONDS)) / RATE
    begin, length = 0.1 * torch.rand(n, 1), 0.08 + 0.05 * torch.rand(n, 1)
    pitch = 300 + 200 * torch.rand(n, 1)
    part = ((time - begin) / length).floor().long()  # the tone that sounds at each moment, 0 to 2; outside none does
    is_high = (words[:, None] >> part.clamp(0, 2)) & 1
    sound = torch.sin(2 * math.pi * pitch * (1 + 0.8 * is_high) * time) * ((part >= 0) & (part < 3))
    return sound + 0.4 * torch.randn(n, len(time)), words


def frames(sound: Tensor) -> Tensor:
    """Return the logarithm of the spectrogram, (n, frames, frequencies), from 0 to 1 kHz."""
    window = torch.hann_window(128)
    spectrum = torch.stft(sound, 128, hop_length=64, window=window, center=False, return_complex=True)
    return spectrum.abs().square().add(1e-3).log()[:, :33].transpose(1, 2)


class Recognizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(33, 48, batch_first=True), nn.Linear(48, N_WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


(train_sound, train_words), (test_sound, test_words) = speech(2048), speech(512)
train, test = frames(train_sound), [(frames(test_sound), test_words)]
batches = list(zip(train.split(64), train_words.split(64), strict=True))
net = Recognizer()
tq.fit(net, batches, epochs=8, learning_rate=1e-2)

rules = [{"types": ["LSTM"], "weight": "affine:4,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"}]
rules += [{"types": ["Linear"], "weight": "affine:8,symmetric=narrow/channel", "input": "affine:8"}]
model = tq.quantize(net, rules, train[:2])
print(model.plan.describe())
tq.calibrate(model, batches, max_batches=8)
accuracy = {"float32": tq.evaluate(net, test), "calibrated": tq.evaluate(model, test)}
tq.fit(model, batches, epochs=2, learning_rate=2e-3, state=tq.QModuleState.QUANT_AWARE_TRAIN)
accuracy["trained"] = tq.evaluate(model, test)
for name, share in accuracy.items():
    print(f"{name:10} {share:.2%} of the words")

torch.save(net.state_dict(), "float.pt")
save_packed(model, "speech.safetensors")
export_onnx(model, "speech.onnx", train[:2])
print(file_sizes(["."]))
print(certify(model, "speech.onnx", test))

assert accuracy["float32"] > 0.9
assert accuracy["trained"] > accuracy["float32"] - 0.02
