"""Start a float model from pretrained weights, by name or from a file, and prepare pictures as they were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._files import is_file
from torchquant._registry import not_one_of
from torchquant._shown import some
from torchquant.compat.checkpoints import plain_state
from torchquant.deploy.packed.reading import read_checkpoint
from torchquant.errors import ConfigError, one_line, require
from torchquant.runs.data import Preprocessing

DEFAULT = "DEFAULT"
SOURCES = ("torchvision", "timm")


def source_of(model: str) -> tuple[str, str]:
    """Return the library that has a model of this name, and its name there; ("", name) for any other model.

    >>> source_of("timm:resnet18"), source_of("resnet18"), source_of("net.py:build")
    (('timm', 'resnet18'), ('torchvision', 'resnet18'), ('', 'net.py:build'))
    """
    library, colon, name = model.partition(":")
    if colon:
        return (library, name) if library in SOURCES else ("", model)
    if model in require("torchvision.models", "all").list_models():
        return "torchvision", model
    try:
        return ("timm", model) if require("timm", "dev").is_model(model) else ("", model)
    except ImportError:
        return "", model


def check_weights(model: str, weights: str) -> None:
    """Raise ConfigError for weights that the model does not have by that name, and that are no file."""
    if is_file(weights):
        return
    library, name = source_of(model)
    if not library:
        raise ConfigError(
            f"{model} is not a model of torchvision or timm, so it has no weights by name, and there is no file "
            f"{weights!r}; give the path of a state dict"
        )
    if not known_weights(library, name):
        raise ConfigError(f"{library} has no pretrained weights of {name}; give the path of a state dict")
    if weights not in (DEFAULT, *known_weights(library, name)):
        found = not_one_of("weights", weights, [DEFAULT, *known_weights(library, name)])
        raise ConfigError(f"{found} It can be the path of a state dict too; there is no such file")


def known_weights(library: str, name: str) -> list[str]:
    """Return the names of the pretrained weights of a model."""
    if library == "torchvision":
        return [entry.name for entry in require("torchvision.models", "all").get_model_weights(name)]
    base = name.partition(".")[0]
    return [full.partition(".")[2] for full in require("timm", "dev").list_pretrained(f"{base}.*")]


def preprocessing_of(model: str, weights: str | None) -> Preprocessing | None:
    """Return how pictures were prepared for the weights; for a file, as for the default weights of the model.

    None without weights, and for models that torchvision and timm do not have. Needs no weights on this machine.
    """
    library, name = ("", model) if weights is None else source_of(model)
    if weights is None or not library or not known_weights(library, name):
        return None
    tag = DEFAULT if is_file(weights) else weights
    if library == "torchvision":
        made = require("torchvision.models", "all").get_model_weights(name)[tag].transforms()
        share = made.crop_size[0] / made.resize_size[0]
        return Preprocessing(made.crop_size[0], tuple(made.mean), tuple(made.std), share, made.interpolation.value)
    config = require("timm", "dev").get_pretrained_cfg(_timm_name(name, tag))
    return Preprocessing(config.input_size[-1], config.mean, config.std, config.crop_pct, config.interpolation)


def load_weights(net: nn.Module, model: str, weights: str) -> list[str]:
    """Load pretrained weights into a network, except for a classifier of other classes; return what stays new.

    `net`: the network, or a wrapper that has it as `network`. Raises ConfigError where the weights cannot be loaded, or
    do not fit.
    """
    inner = getattr(net, "network", net)
    assert isinstance(inner, nn.Module)
    state, own = _state(model, weights), inner.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        words = [f"lack {some(missing, 4)}"] * bool(missing) + [f"have {some(unknown, 4)} besides"] * bool(unknown)
        raise ConfigError(f"the weights {weights} are not of {model}: they {' and '.join(words)}")
    new = [name for name, value in own.items() if value.shape != state[name].shape]
    if len({name.rpartition(".")[0] for name in new}) > 1:
        raise ConfigError(f"the weights {weights} are not of {model}: {some(new, 4)} have other shapes")
    inner.load_state_dict({**state, **{name: own[name] for name in new}})
    return new


def _state(model: str, weights: str) -> Mapping[str, Tensor]:
    if is_file(weights):
        return plain_state(read_checkpoint(weights))
    library, name = source_of(model)
    try:
        if library == "torchvision":
            entry = require("torchvision.models", "all").get_model_weights(name)[weights]
            return dict(entry.get_state_dict(progress=False))
        return dict(require("timm", "dev").create_model(_timm_name(name, weights), pretrained=True).state_dict())
    except Exception as error:  # downloads fail in many ways
        raise ConfigError(
            f"the weights {weights} of {model} are not on this machine and could not be downloaded "
            f"({type(error).__name__}: {one_line(error)}); {_where(library, name, weights)}, or give --weights FILE"
        ) from error


def _where(library: str, name: str, weights: str) -> str:
    """Say which file to put where."""
    if library == "torchvision":
        url = require("torchvision.models", "all").get_model_weights(name)[weights].url
        return f"put {url} into {Path(torch.hub.get_dir()) / 'checkpoints'}"
    config: Any = require("timm", "dev").get_pretrained_cfg(_timm_name(name, weights))
    return f"download {config.hf_hub_id or config.url} on a machine with a network"


def _timm_name(name: str, weights: str) -> str:
    return name if weights == DEFAULT else f"{name.partition('.')[0]}.{weights}"
