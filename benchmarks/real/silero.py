"""Silero's voice activity detector for 16 kHz, whose package ships the weights without a PyTorch class for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK, CONTEXT = 512, 64
"""Samples of a chunk, and of the chunk before it that go with it."""


class SileroVad(nn.Module):
    """One chunk -> probability of speech: learned STFT, four convolutions, an LSTM cell, one more convolution.

    After `silero_vad/tinygrad_model.py` of the package, whose names of weights it keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, chunk: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chunks [n, 576] and states [n, 128] -> probabilities [n, 1] and the next states."""
        spectrum = self.stft_conv(F.pad(chunk, (0, CONTEXT), "reflect").unsqueeze(1))
        x = (spectrum[:, :129] ** 2 + spectrum[:, 129:] ** 2).sqrt()
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x)).squeeze(-1)
        hidden, cell = self.lstm_cell(x, (hidden, cell))
        x = torch.sigmoid(self.final_conv(F.relu(hidden.unsqueeze(-1))))
        return x.squeeze(1).mean(1, keepdim=True), hidden, cell


def trajectory(model: SileroVad, waves: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The arguments of the float model on each chunk of waves [n, samples], states running on."""
    hidden = cell = waves.new_zeros(len(waves), 128)
    padded = F.pad(waves, (CONTEXT, 0))
    calls = []
    for start in range(0, waves.shape[1] - CHUNK + 1, CHUNK):
        chunk = padded[:, start : start + CHUNK + CONTEXT]
        calls.append((chunk, hidden, cell))
        with torch.no_grad():
            _, hidden, cell = model(chunk, hidden, cell)
    return calls
