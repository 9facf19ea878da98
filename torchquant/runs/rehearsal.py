"""Try everything that a run will do on a copy of its model and two images, so that a mistake costs no training."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from torchquant import training
from torchquant.quantizers import make_quantizer
from torchquant.runs.data import TrainingData

LEAST = 2
"""Number of images, the smallest that batch norms train on."""


def rehearse(model: nn.Module, data: TrainingData, trains: bool) -> None:
    """Calibrate the quantized model, train it for a step if the run `trains`, and evaluate it; the model changes.

    Raises what the run would raise later. Warnings are left to the run.
    """
    images, labels = data.test_images[:LEAST], data.test_labels[:LEAST]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.calibrate(model, [(images, labels)], with_targets=True, show_progress=False)
        if trains and len(images) == LEAST:
            training.fit_quantized(model, [(images, labels)], 1, 1e-6, show_progress=False)
        training.evaluate(model, [(images, labels)], show_progress=False)


def rehearse_quantizer(spec: str, slot: str) -> None:
    """Let a quantizer observe, quantize and give a gradient for a few numbers. Raises what a run would raise later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer = make_quantizer(spec, slot)
        x = torch.linspace(-1.0, 1.0, 128).reshape(2, 4, 4, 4).clone().requires_grad_()
        quantizer.allocate(x.shape[0 if slot == "weight" else 1])
        quantizer.pre_observe(x.detach())
        quantizer.train()(x).sum().backward()
        quantizer.eval()(x.detach())
