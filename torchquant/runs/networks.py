"""Build the networks of runs, by name or from a file, and make them quantizable where no plan is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant._user_code import failure
from torchquant.compat.checkpoints import load_checkpoint
from torchquant.deploy.packed.references import model_of
from torchquant.errors import ConfigError, require
from torchquant.plan import quantize
from torchquant.quantizers import QuantizerFactory
from torchquant.runs.data import Pictures, TrainingData, load_data
from torchquant.runs.options import RunOptions
from torchquant.runs.pretrained import SOURCES, check_weights, load_weights, preprocessing_of, source_of
from torchquant.runs.ranks import Ranks
from torchquant.runs.small_mobilenet import SmallMobileNetV2
from torchquant.runs.small_resnet import QuantSmallResNet, SmallResNet

SMALL = 64
"""Largest image side for which a ResNet begins with a 3x3 convolution and without pooling, as usual for CIFAR."""


@dataclass(frozen=True)
class Network:
    """A named network: how to build it for data, how to make it quantizable, and its learning rates."""

    build: Callable[[TrainingData], nn.Module]
    quantize: Callable[[nn.Module, QuantizerFactory, QuantizerFactory, bool | str], nn.Module]
    float_rate: float
    rate: float


def _small(data: TrainingData) -> nn.Module:
    return SmallResNet(n_channels=data.n_channels, n_classes=data.n_classes)


def _quantized_small(
    network: nn.Module, weight: QuantizerFactory, acts: QuantizerFactory, fold_bn: bool | str
) -> nn.Module:
    assert isinstance(network, SmallResNet)
    return QuantSmallResNet(network, weight, acts, fold_bn)


def _small_mobilenet(data: TrainingData) -> nn.Module:
    return SmallMobileNetV2(n_channels=data.n_channels, n_classes=data.n_classes)


def _by_plan(network: nn.Module, weight: QuantizerFactory, acts: QuantizerFactory, fold_bn: bool | str) -> nn.Module:
    """Quantize a network at every site that `quantize` finds; the class scores stay float."""
    rules: list[dict[str, Any]] = [
        {"weight": weight, "input": acts, "output": acts, "fold_bn": fold_bn},
        {"position": "last", "output": None},
    ]
    return quantize(network, rules)


class Gray(nn.Module):
    """Repeats the one channel of a picture for a network that takes three."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.expand(-1, 3, -1, -1))


def _torchvision(name: str) -> Callable[[TrainingData], nn.Module]:
    def build(data: TrainingData) -> nn.Module:
        network = getattr(require("torchvision.models", "all"), name)(num_classes=data.n_classes)
        if name.startswith("resnet") and data.test_images.shape[-1] <= SMALL:
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        return network if data.n_channels == 3 else Gray(network)

    return build


def _efficientnet(data: TrainingData) -> nn.Module:
    package = require("efficientnet_pytorch", "all")
    network = package.EfficientNet.from_name(
        "efficientnet-b0", num_classes=data.n_classes, image_size=data.test_images.shape[-1]
    )
    return network if data.n_channels == 3 else Gray(network)


def _fused(kind: str) -> Callable[[nn.Module, QuantizerFactory, QuantizerFactory, bool | str], nn.Module]:
    def quantize(
        network: nn.Module, weight: QuantizerFactory, acts: QuantizerFactory, fold_bn: bool | str
    ) -> nn.Module:
        import torchquant.models as models

        inner = network.network if isinstance(network, Gray) else network
        assert isinstance(inner, nn.Module)
        options = {"quantize_first": True, "quantize_fc": True, "fold_bn": fold_bn, "input_quantizer": acts}
        fused = getattr(models, kind)(inner, weight, acts, **options)
        return Gray(fused) if isinstance(network, Gray) else fused

    return quantize


NETWORKS = {
    "demo": Network(_small, _quantized_small, 8e-3, 3e-3),
    "small_mobilenet": Network(_small_mobilenet, _by_plan, 8e-3, 3e-3),
    **{
        name: Network(_torchvision(name), _fused("FusedResNet"), 1e-3, 3e-4)
        for name in ("resnet18", "resnet34", "resnet50")
    },
    "mobilenet_v2": Network(_torchvision("mobilenet_v2"), _fused("FusedMobileNetV2"), 1e-3, 3e-4),
    "efficientnet_b0": Network(_efficientnet, _fused("FusedEfficientNet"), 1e-3, 3e-4),
}


def network_of(name: str) -> Network:
    """Return a network by name, or one that `build_model` builds and a plan quantizes. Raises ConfigError."""
    return NETWORKS.get(name) or Network(partial(build_model, name), _by_plan, 1e-3, 3e-4)


def build_model(name: str, data: TrainingData, published: bool = False) -> nn.Module:
    """Build a model by name, for the classes and channels of the data. Raises ConfigError, MissingDependencyError.

    A name is looked up in the networks of `torchquant compare`, then in torchvision, then in timm; "torchvision:NAME"
    and "timm:NAME" name the library; or it is "path/to/file.py:function". `published`: leave the network as it is
    published, with the beginning and the three channels that pretrained weights are for.
    """
    library, colon, plain = name.partition(":")
    if colon and library not in SOURCES:
        return model_of(name)
    if name in NETWORKS and not published:
        return NETWORKS[name].build(data)
    models = require("torchvision.models", "all")
    wanted = plain if colon else name
    if wanted in models.list_models() and library != "timm":
        net = models.get_model(wanted, num_classes=data.n_classes)
        return net if data.n_channels == 3 else Gray(net)
    try:
        timm = require("timm", "dev")
    except ImportError as error:
        raise ConfigError(f"no model '{name}' in torchvision, and timm is not installed; pip install timm") from error
    if not timm.is_model(wanted) or library == "torchvision":
        known = [*NETWORKS, *models.list_models(), *([] if library == "torchvision" else timm.list_models())]
        raise ConfigError(
            f"no model {shown(name)} in torchvision or timm;{did_you_mean(wanted, known)} Valid names are listed by "
            "torchvision.models.list_models() and timm.list_models(); a model of your own is path/to/file.py:function"
        )
    channels = 3 if published else data.n_channels
    net = timm.create_model(wanted, pretrained=False, num_classes=data.n_classes, in_chans=channels)
    return net if data.n_channels == channels else Gray(net)


class Job(Protocol):
    """Interface of the settings of a run with one model."""

    @property
    def model(self) -> str: ...

    @property
    def data(self) -> str | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def checkpoint(self) -> str | None: ...

    @property
    def weights(self) -> str | None: ...

    @property
    def float_epochs(self) -> int: ...


def data_of(config: Job) -> TrainingData:
    """Load the data of a run, prepared as for the pretrained weights that it starts from."""
    if config.weights is not None:
        check_weights(config.model, config.weights)
    prepared = preprocessing_of(config.model, config.weights)
    if prepared is None:
        return load_data(str(config.data), config.seed)
    return load_data(str(config.data), config.seed, prepared=prepared)


def model_for(config: Job, data: TrainingData) -> nn.Module:
    """Build the float model of a run, without pretrained weights."""
    return build_model(config.model, data, is_published(config))


def is_published(config: Job) -> bool:
    """Tell whether the network stays as its library has published it, since it starts from pretrained weights."""
    return config.weights is not None and bool(source_of(config.model)[0])


def start_in_words(config: Job, new: list[str]) -> str:
    """Say what the float model of a run starts from, and whether it is trained.

    `new`: the parameters that pretrained weights do not have. Raises ConfigError if they would stay untrained.
    """
    if config.checkpoint is not None:
        return f"{config.model} is the float model of {config.checkpoint}"
    trained = f"trained for {config.float_epochs} epochs on {config.data}" if config.float_epochs else "not trained"
    if config.weights is None:
        is_own = ":" in config.model and config.model.partition(":")[0] not in SOURCES
        start = "as its function builds it" if is_own else "from RANDOM weights"
        more = "" if is_own else "; --weights takes pretrained ones, --checkpoint your own"
        return f"{config.model} starts {start} and is {trained} in float{more}"
    if new and not config.float_epochs:
        raise ConfigError(
            f"{', '.join(new)} has other classes in the weights {config.weights}, so it is new and must be trained; "
            "float_epochs must be at least 1"
        )
    words = f", except for {', '.join(new)}, which is new" if new else ""
    return f"{config.model} starts from the weights {config.weights}{words}, and is {trained} in float"


def place_job(
    config: Job, options: RunOptions, ranks: Ranks | None = None, tell: Callable[[str], object] | None = None
) -> tuple[TrainingData, nn.Module]:
    """Load the data of a run and build its float model, in eval mode; both are on the device of the options.

    `tell` is called with what the model starts from, in words.
    """
    where = ranks or Ranks(device=options.device or "cpu")
    data = where.share(data_of(config))
    torch.manual_seed(config.seed)
    net = model_for(config, data)
    new = [] if config.weights is None else load_weights(net, config.model, config.weights)
    words = start_in_words(config, new)
    if tell is not None:
        tell(words)
    return data, net.to(where.device).eval()


@torch.no_grad()
def tried(net: nn.Module, data: TrainingData, name: str, checkpoint: str | None) -> nn.Module:
    """Copy the model with the checkpoint loaded. Raises ConfigError if it gives no class scores for these pictures."""
    net = copy.deepcopy(net).eval()
    if checkpoint is not None:
        load_checkpoint(net, checkpoint)
    images = data.test_images[:2]
    takes = f"pictures of shape {tuple(images.shape)}"
    try:
        scores = net(images)
    except Exception as error:
        colour = ", which are always in colour" if isinstance(data, Pictures) else ""
        raise ConfigError(f"the model {name} does not take {takes}{colour}: {failure(error, 'it')}") from error
    wanted = f"scores of shape ({len(images)}, {data.n_classes})"
    if not isinstance(scores, Tensor):
        raise ConfigError(f"the model {name} must return {wanted} for {takes}, got {type(scores).__name__}")
    if scores.ndim != 2 or len(scores) != len(images) or scores.shape[1] < data.n_classes:
        raise ConfigError(f"the model {name} must return {wanted} for {takes}, got shape {tuple(scores.shape)}")
    return net
