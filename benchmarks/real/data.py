"""Inputs for real networks: pictures and sentences that packages ship, and speech that is synthesised.

Calibration and test inputs come from disjoint halves of pictures, sentences and speakers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import signal
from torch import Tensor
from torch.nn import functional as F

PICTURES = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "color"),
    *("hubble_deep_field", "ihc", "motorcycle_left", "retina", "rocket"),
)
"""Pictures of scikit-image; their left halves are for calibration, their right halves for tests."""

SAMPLING_RATE = 16000
"""Samples a second of speech."""

VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
    (490, 1350, 1690),
)
"""First three formants of vowels, in Hz (Peterson and Barney 1952, means of men)."""


def crops(part: str, n: int, size: int) -> Tensor:
    """`n` random crops (0.35 to 1 of the short side) of the pictures of a part, [n, 3, size, size] in 0..1."""
    from skimage import data as pictures

    folder = Path(pictures.__file__).parent
    random = np.random.default_rng(sum(part.encode()))
    images = [_half(_picture(folder, name), part) for name in PICTURES]
    return torch.stack([_crop(images[i % len(images)], random, size) for i in range(n)])


def _picture(folder: Path, name: str) -> Tensor:
    from skimage import io

    path = next(path for path in (folder / f"{name}{suffix}" for suffix in (".png", ".jpg")) if path.is_file())
    image = np.atleast_3d(io.imread(path))[..., :3]
    image = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255


def _half(image: Tensor, part: str) -> Tensor:
    """The left half of a picture for calibration, the right one for tests."""
    middle = image.shape[-1] // 2
    return image[..., :middle] if part == "calibration" else image[..., middle:]


def _crop(image: Tensor, random: np.random.Generator, size: int) -> Tensor:
    _, height, width = image.shape
    side = int(min(height, width) * random.uniform(0.35, 1.0))
    top, left = random.integers(height - side + 1), random.integers(width - side + 1)
    crop = image[None, :, top : top + side, left : left + side]
    crop = crop.flip(-1) if random.random() < 0.5 else crop
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def sentences(part: str) -> list[str]:
    """Sentences of scikit-learn's descriptions of its data sets; every second one is for tests."""
    from sklearn import datasets

    folder = Path(datasets.__file__).parent / "descr"
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))
    found = re.findall(r"[A-Z][a-z]+ [A-Za-z0-9 ,;:()'\"-]{30,220}\.", re.sub(r"\s+", " ", text))
    found = list(dict.fromkeys(found))
    return found[0::2] if part == "calibration" else found[1::2]


def speech(part: str, n: int, seconds: float) -> Tensor:
    """`n` utterances of synthetic speakers, [n, samples] in -1..1 at 16 kHz: pulses through formants, pauses."""
    random = np.random.default_rng(sum(part.encode()) + 7)
    return torch.stack([torch.from_numpy(_utterance(random, seconds)) for _ in range(n)]).float()


def _utterance(random: np.random.Generator, seconds: float) -> np.ndarray[Any, Any]:
    """Syllables of 80 to 300 ms, a fifth of them hisses and a fifth silent, of one speaker."""
    n_samples = int(seconds * SAMPLING_RATE)
    pitch, tract = random.uniform(85, 260), random.uniform(0.9, 1.2)
    pieces: list[np.ndarray[Any, Any]] = []
    while sum(map(len, pieces)) < n_samples:
        length = int(random.uniform(0.08, 0.3) * SAMPLING_RATE)
        kind = random.random()
        if kind < 0.2:
            pieces.append(np.zeros(length))
        elif kind < 0.4:
            numerator, denominator = signal.butter(2, [2500, 7000], "band", fs=SAMPLING_RATE)
            pieces.append(
                0.3 * signal.lfilter(numerator, denominator, random.standard_normal(length)) * np.hanning(length)
            )
        else:
            pieces.append(_vowel(random, length, pitch * random.uniform(0.8, 1.25), tract))
    wave = np.concatenate(pieces)[:n_samples]
    wave = wave / np.abs(wave).max() * random.uniform(0.1, 0.9)
    return wave + 10 ** random.uniform(-4, -2.3) * random.standard_normal(n_samples)


def _vowel(random: np.random.Generator, length: int, pitch: float, tract: float) -> np.ndarray[Any, Any]:
    """Pulses of a gliding pitch through the resonances of a vowel."""
    glide = pitch * np.linspace(1.0, random.uniform(0.8, 1.2), length)
    pulses = np.diff(np.floor(np.cumsum(glide) / SAMPLING_RATE), prepend=0.0)
    sound = signal.lfilter([1.0], [1.0, -0.95], pulses) + 0.01 * random.standard_normal(length)
    for formant in VOWELS[random.integers(len(VOWELS))]:
        angle, radius = 2 * np.pi * formant * tract / SAMPLING_RATE, np.exp(-np.pi * 90 / SAMPLING_RATE)
        sound = signal.lfilter([1 - radius], [1.0, -2 * radius * np.cos(angle), radius**2], sound)
    sound = sound / (np.abs(sound).max() + 1e-9)
    return sound * np.hanning(length) ** 0.5


def batches(rows: Tensor, size: int) -> Sequence[tuple[Tensor, ...]]:
    """A tensor cut into batches, each a tuple of one argument."""
    return [(batch.contiguous(),) for batch in rows.split(size)]
